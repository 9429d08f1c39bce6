// AVX-512: 16 lanes, 32 registers.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>

namespace {

struct Avx512 {
  static constexpr int W = 16;        // lanes of a vector
  static constexpr int ROWS = 12;     // rows of the register tile
  static constexpr int PAIR = 1;      // elements that one 32-bit operand holds
  static constexpr bool TILES = false;  // has matrix tiles: see amx.h
  using f = __m512;
  static f load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, f v) { _mm512_storeu_ps(p, v); }
  static f all(float x) { return _mm512_set1_ps(x); }
  // Keeps a value in a register: left to itself gcc spills operands of the register tile, or loads them once per multiply.
  static f pin(f x) {
    asm("" : "+v"(x));
    return x;
  }
  static f spread(float a) { return pin(all(a)); }
  static f dot(f acc, f a, f b) { return _mm512_fmadd_ps(a, b, acc); }
  static f fma(f a, f b, f c) { return _mm512_fmadd_ps(a, b, c); }
  static f mul(f a, f b) { return _mm512_mul_ps(a, b); }
  static f add(f a, f b) { return _mm512_add_ps(a, b); }
  static f sub(f a, f b) { return _mm512_sub_ps(a, b); }
  static f max(f a, f b) { return _mm512_max_ps(a, b); }  // b when either is NaN
  static bool any_gt(f a, f b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
  // x where x == y, else other
  static f if_equal(f x, float y, f then, f other) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, all(y), _CMP_EQ_OQ), other, then);
  }
  static f frac(f x) { return _mm512_reduce_ps(x, 1); }                   // x - floor(x); 0 for infinities
  static f scale2(f p, f x, f) { return _mm512_scalef_ps(p, x); }         // p * 2^floor(x)
  static f clamp_exponent(f x) { return x; }
  // Lanes base + l in [lo, hi] of x, the others y.
  static f keep_range(f x, int lo, int hi, int base, f y) {
    const __m512i lane = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                          _mm512_set1_epi32(base));
    const __mmask16 m = _mm512_cmp_epi32_mask(lane, _mm512_set1_epi32(lo), _MM_CMPINT_NLT) &
                        _mm512_cmp_epi32_mask(lane, _mm512_set1_epi32(hi), _MM_CMPINT_LE);
    return _mm512_mask_blend_ps(m, y, x);
  }
  static f keep_equal(f x, const int32_t* a, int32_t b, f y) {
    return _mm512_mask_blend_ps(_mm512_cmpeq_epi32_mask(_mm512_loadu_si512(a), _mm512_set1_epi32(b)), y, x);
  }
  static f from_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void to_half(uint16_t* p, f v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  // W 32-bit words, each in the low half of a 64-bit lane, those of even and odd lanes apart. High halves hold anything.
  struct words {
    __m512i even, odd;
  };
  static words load_words(const uint32_t* p) {
    const __m512i x = _mm512_loadu_si512(p);
    return {x, _mm512_srli_epi64(x, 32)};
  }
  static words all_words(uint32_t x) { return {_mm512_set1_epi32(int(x)), _mm512_set1_epi32(int(x))}; }
  static words multiply(words a, uint32_t b) {  // 64-bit products
    const __m512i m = _mm512_set1_epi64(b);
    return {_mm512_mul_epu32(a.even, m), _mm512_mul_epu32(a.odd, m)};
  }
  static words high(words a) {  // of 64-bit lanes
    return {_mm512_shuffle_epi32(a.even, _MM_PERM_DDBB), _mm512_shuffle_epi32(a.odd, _MM_PERM_DDBB)};
  }
  static words exclusive(words a, words b, words c) {  // a ^ b ^ c
    return {_mm512_ternarylogic_epi32(a.even, b.even, c.even, 0x96), _mm512_ternarylogic_epi32(a.odd, b.odd, c.odd, 0x96)};
  }
  static uint32_t at_least(words a, uint32_t b) {  // bit per lane: a >= b, unsigned
    const __m512i both = _mm512_mask_shuffle_epi32(a.even, 0xaaaa, a.odd, _MM_PERM_CCAA);
    return _mm512_cmpge_epu32_mask(both, _mm512_set1_epi32(int(b)));
  }
  // Lanes of x whose bit is set, the others 0.
  static f keep_bits(f x, uint32_t bits) { return _mm512_maskz_mov_ps(__mmask16(bits), x); }

  // dst[c][r] = src[r][c] for a W x W tile of 32-bit values; leading dimensions in values.
  static void transpose(const float* src, long ld, float* dst, long ldd) {
    __m512 r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = load(src + i * ld);
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
      r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
      r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
      r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      store(dst + i * ldd, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
      store(dst + (i + 8) * ldd, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
      store(dst + (i + 4) * ldd, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
      store(dst + (i + 12) * ldd, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd));
    }
  }
};

}  // namespace
