// The vectors of the AMX engine for any machine: 16 lanes as four portable vectors, pairs of bf16, emulated tiles.
#pragma once
#include "emulated_tiles.h"
#include "vec_portable.h"

namespace {

struct AmxBf16Emulated : EmulatedTiles {
  using P = Portable;
  static constexpr int W = 16;
  static constexpr int ROWS = 4;
  static constexpr int PAIR = 2;
  static constexpr bool TILES = true;
  struct f {
    P::f part[4];
  };
  using EmulatedTiles::dot;
  using EmulatedTiles::load;
  using EmulatedTiles::store;

  template <class F>
  static f each(const F& function) {
    return {function(0), function(1), function(2), function(3)};
  }
  static f load(const float* p) {
    return each([&](int i) { return P::load(p + 4 * i); });
  }
  static void store(float* p, f v) {
    for (int i = 0; i < 4; ++i) P::store(p + 4 * i, v.part[i]);
  }
  static f all(float x) {
    return each([&](int) { return P::all(x); });
  }
  static f pin(f x) { return x; }
  static f spread(float a) { return all(a); }
  static f fma(f a, f b, f c) {
    return each([&](int i) { return P::fma(a.part[i], b.part[i], c.part[i]); });
  }
  static f mul(f a, f b) {
    return each([&](int i) { return P::mul(a.part[i], b.part[i]); });
  }
  static f add(f a, f b) {
    return each([&](int i) { return P::add(a.part[i], b.part[i]); });
  }
  static f sub(f a, f b) {
    return each([&](int i) { return P::sub(a.part[i], b.part[i]); });
  }
  static f max(f a, f b) {
    return each([&](int i) { return P::max(a.part[i], b.part[i]); });
  }
  static bool any_gt(f a, f b) {
    bool any = false;
    for (int i = 0; i < 4; ++i) any |= P::any_gt(a.part[i], b.part[i]);
    return any;
  }
  static f if_equal(f x, float y, f then, f other) {
    return each([&](int i) { return P::if_equal(x.part[i], y, then.part[i], other.part[i]); });
  }
  static f frac(f x) {
    return each([&](int i) { return P::frac(x.part[i]); });
  }
  static f scale2(f p, f x, f t) {
    return each([&](int i) { return P::scale2(p.part[i], x.part[i], t.part[i]); });
  }
  static f clamp_exponent(f x) {
    return each([&](int i) { return P::clamp_exponent(x.part[i]); });
  }
  static f keep_range(f x, int lo, int hi, int base, f y) {
    return each([&](int i) { return P::keep_range(x.part[i], lo, hi, base + 4 * i, y.part[i]); });
  }
  static f keep_equal(f x, const int32_t* a, int32_t b, f y) {
    return each([&](int i) { return P::keep_equal(x.part[i], a + 4 * i, b, y.part[i]); });
  }
  static f from_half(const uint16_t* p) {
    return each([&](int i) { return P::from_half(p + 4 * i); });
  }
  static void to_half(uint16_t* p, f v) {
    for (int i = 0; i < 4; ++i) P::to_half(p + 4 * i, v.part[i]);
  }
  struct words {
    P::words part[4];
  };
  template <class F>
  static words each_words(const F& function) {
    return {{function(0), function(1), function(2), function(3)}};
  }
  static words load_words(const uint32_t* p) {
    return each_words([&](int i) { return P::load_words(p + 4 * i); });
  }
  static words all_words(uint32_t x) {
    return each_words([&](int) { return P::all_words(x); });
  }
  static words multiply(words a, uint32_t b) {
    return each_words([&](int i) { return P::multiply(a.part[i], b); });
  }
  static words high(words a) {
    return each_words([&](int i) { return P::high(a.part[i]); });
  }
  static words exclusive(words a, words b, words c) {
    return each_words([&](int i) { return P::exclusive(a.part[i], b.part[i], c.part[i]); });
  }
  static uint32_t at_least(words a, uint32_t b) {
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) bits |= P::at_least(a.part[i], b) << 4 * i;
    return bits;
  }
  static f keep_bits(f x, uint32_t bits) {
    return each([&](int i) { return P::keep_bits(x.part[i], bits >> 4 * i); });
  }
  static void transpose(const float* src, long ld, float* dst, long ldd) {
    for (int r = 0; r < W; ++r)
      for (int c = 0; c < W; ++c) dst[c * ldd + r] = src[r * ld + c];
  }

  // Lane l of an operand is the pair (low, high half) of bf16.
  static f dot(f acc, f a, f b) {
    return each([&](int i) { return acc.part[i] + upper(a.part[i]) * upper(b.part[i]) + lower(a.part[i]) * lower(b.part[i]); });
  }
  static f pair(f even, f odd) {
    return each([&](int i) { return P::f(rounded(even.part[i]) >> 16 | (rounded(odd.part[i]) & 0xffff0000u)); });
  }
  static void store_bf16(void* p, f v) {
    uint16_t* out = static_cast<uint16_t*>(p);
    for (int l = 0; l < W; ++l) out[l] = uint16_t(rounded(v.part[l / 4])[l % 4] >> 16);
  }

 private:
  typedef uint32_t u __attribute__((vector_size(16)));
  static P::f lower(P::f x) { return P::f(u(x) << 16); }
  static P::f upper(P::f x) { return P::f(u(x) & 0xffff0000u); }
  // Bits whose upper half is bf16, to nearest even; NaN stays NaN.
  static u rounded(P::f x) {
    const u bits = u(x), nan = u(x != x);
    return (nan & (bits | 0x400000u)) | (~nan & (bits + 0x7fffu + (bits >> 16 & 1u)));
  }
};

}  // namespace
