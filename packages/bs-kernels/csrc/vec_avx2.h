// AVX2 + FMA + F16C: 8 lanes, 16 registers.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>

namespace {

struct Avx2 {
  static constexpr int W = 8;
  static constexpr int ROWS = 6;
  static constexpr int PAIR = 1;
  static constexpr bool TILES = false;
  using f = __m256;
  static f load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, f v) { _mm256_storeu_ps(p, v); }
  static f all(float x) { return _mm256_set1_ps(x); }
  static f pin(f x) { return x; }
  static f spread(float a) { return _mm256_set1_ps(a); }
  static f dot(f acc, f a, f b) { return _mm256_fmadd_ps(a, b, acc); }
  static f fma(f a, f b, f c) { return _mm256_fmadd_ps(a, b, c); }
  static f mul(f a, f b) { return _mm256_mul_ps(a, b); }
  static f add(f a, f b) { return _mm256_add_ps(a, b); }
  static f sub(f a, f b) { return _mm256_sub_ps(a, b); }
  static f max(f a, f b) { return _mm256_max_ps(a, b); }
  static bool any_gt(f a, f b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
  static f if_equal(f x, float y, f then, f other) {
    return _mm256_blendv_ps(other, then, _mm256_cmp_ps(x, all(y), _CMP_EQ_OQ));
  }
  static f frac(f x) { return _mm256_sub_ps(x, _mm256_floor_ps(x)); }
  // p * 2^floor(x) for x that went through clamp_exponent; `fr` is frac(x).
  static f scale2(f p, f x, f fr) {
    const __m256i n = _mm256_cvtps_epi32(_mm256_sub_ps(x, fr));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)));
  }
  // Keeps the exponent of 2^x representable: 2^-127 becomes 0. NaN passes.
  static f clamp_exponent(f x) { return _mm256_min_ps(all(127.f), _mm256_max_ps(all(-127.f), x)); }
  static f keep_range(f x, int lo, int hi, int base, f y) {
    const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(base));
    const __m256i out = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(lo), lane),
                                        _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(hi)));
    return _mm256_blendv_ps(x, y, _mm256_castsi256_ps(out));
  }
  static f keep_equal(f x, const int32_t* a, int32_t b, f y) {
    const __m256i eq = _mm256_cmpeq_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)), _mm256_set1_epi32(b));
    return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(eq));
  }
  static f from_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void to_half(uint16_t* p, f v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  // As in vec_avx512.h.
  struct words {
    __m256i even, odd;
  };
  static words load_words(const uint32_t* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {x, _mm256_srli_epi64(x, 32)};
  }
  static words all_words(uint32_t x) { return {_mm256_set1_epi32(int(x)), _mm256_set1_epi32(int(x))}; }
  static words multiply(words a, uint32_t b) {
    const __m256i m = _mm256_set1_epi64x(b);
    return {_mm256_mul_epu32(a.even, m), _mm256_mul_epu32(a.odd, m)};
  }
  static words high(words a) { return {_mm256_shuffle_epi32(a.even, 0xf5), _mm256_shuffle_epi32(a.odd, 0xf5)}; }
  static words exclusive(words a, words b, words c) {
    return {_mm256_xor_si256(a.even, _mm256_xor_si256(b.even, c.even)), _mm256_xor_si256(a.odd, _mm256_xor_si256(b.odd, c.odd))};
  }
  static uint32_t at_least(words a, uint32_t b) {
    const __m256i both = _mm256_blend_epi32(a.even, _mm256_shuffle_epi32(a.odd, 0xa0), 0xaa);
    const __m256i larger = _mm256_max_epu32(both, _mm256_set1_epi32(int(b)));
    return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(both, larger))));
  }
  static f keep_bits(f x, uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lane), lane);
    return _mm256_and_ps(x, _mm256_castsi256_ps(set));
  }

  static void transpose(const float* src, long ld, float* dst, long ldd) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = load(src + i * ld);
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      store(dst + i * ldd, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
      store(dst + (i + 4) * ldd, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
  }
};

}  // namespace
