// AVX-512 with bf16 dot products: one 32-bit operand holds two neighbouring elements of the summed dimension.
#pragma once
#include "vec_avx512.h"

namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr int PAIR = 2;
  static f dot(f acc, f a, f b) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // Lane l of the result is the pair (bf16(even[l]), bf16(odd[l])), rounded to nearest even.
  static f pair(f even, f odd) {
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both));
  }
  // 16 floats as 16 bf16 in memory order.
  static void store_bf16(void* p, f v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }
};

}  // namespace
