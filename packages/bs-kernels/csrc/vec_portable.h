// Any machine: 4 lanes as a compiler vector, which GCC and Clang map to SSE2, NEON or plain scalars.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Portable {
  static constexpr int W = 4;
  static constexpr int ROWS = 4;
  static constexpr int PAIR = 1;
  static constexpr bool TILES = false;
  typedef float f __attribute__((vector_size(16)));
  typedef int32_t i __attribute__((vector_size(16)));
  static f load(const float* p) {
    f v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, f v) { std::memcpy(p, &v, sizeof v); }
  static f all(float x) { return f{x, x, x, x}; }
  static f pin(f x) { return x; }
  static f spread(float a) { return all(a); }
  static f dot(f acc, f a, f b) { return acc + a * b; }
  static f fma(f a, f b, f c) { return a * b + c; }
  static f mul(f a, f b) { return a * b; }
  static f add(f a, f b) { return a + b; }
  static f sub(f a, f b) { return a - b; }
  static f max(f a, f b) { return a > b ? a : b; }
  static bool any_gt(f a, f b) {
    const i m = a > b;
    return (m[0] | m[1] | m[2] | m[3]) != 0;
  }
  static f if_equal(f x, float y, f then, f other) { return x == all(y) ? then : other; }
  static i floor_int(f x) {  // for |x| < 2^31
    const i n = __builtin_convertvector(x, i);
    return n + (__builtin_convertvector(n, f) > x);  // a true comparison is -1
  }
  static f frac(f x) { return x - __builtin_convertvector(floor_int(x), f); }
  static f scale2(f p, f x, f) {
    const i n = (floor_int(x) + 127) << 23;
    f s;
    std::memcpy(&s, &n, sizeof s);
    return p * s;
  }
  static f clamp_exponent(f x) {
    const f low = x < all(-127.f) ? all(-127.f) : x;
    return low > all(127.f) ? all(127.f) : low;
  }
  static f keep_range(f x, int lo, int hi, int base, f y) {
    const i lane = i{0, 1, 2, 3} + base;
    return ((lane >= lo) & (lane <= hi)) ? x : y;
  }
  static f keep_equal(f x, const int32_t* a, int32_t b, f y) {
    i v;
    std::memcpy(&v, a, sizeof v);
    return v == b ? x : y;
  }
  static float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, body = h & 0x7fff;
    float x;
    if (body >= 0x7c00) {  // inf, NaN
      const uint32_t bits = sign | 0x7f800000u | (body & 0x3ff) << 13;
      std::memcpy(&x, &bits, 4);
    } else {  // 2^112 moves the exponent bias and makes subnormals come out right
      const uint32_t bits = body << 13;
      std::memcpy(&x, &bits, 4);
      x *= 0x1p112f;
      if (sign) x = -x;
    }
    return x;
  }
  static uint16_t float_to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000u) return sign | 0x7e00;
    if (bits >= 0x477ff000u) return sign | 0x7c00;  // rounds to infinity
    if (bits < 0x38800000u) {                       // subnormal: let the float adder round at 2^-24
      float a;
      std::memcpy(&a, &bits, 4);
      a += 0.5f;
      std::memcpy(&bits, &a, 4);
      return sign | uint16_t(bits - 0x3f000000u);
    }
    return sign | uint16_t((bits - 0x38000000u + 0xfff + (bits >> 13 & 1)) >> 13);
  }
  static f from_half(const uint16_t* p) {
    return f{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
  }
  static void to_half(uint16_t* p, f v) {
    for (int l = 0; l < 4; ++l) p[l] = float_to_half(v[l]);
  }
  // As in vec_avx512.h, one word per element.
  struct words {
    uint64_t x[W];
  };
  static words load_words(const uint32_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static words all_words(uint32_t x) { return {{x, x, x, x}}; }
  static words multiply(words a, uint32_t b) {
    for (uint64_t& x : a.x) x = uint64_t(uint32_t(x)) * b;
    return a;
  }
  static words high(words a) {
    for (uint64_t& x : a.x) x >>= 32;
    return a;
  }
  static words exclusive(words a, words b, words c) {
    for (int l = 0; l < W; ++l) a.x[l] ^= b.x[l] ^ c.x[l];
    return a;
  }
  static uint32_t at_least(words a, uint32_t b) {
    uint32_t bits = 0;
    for (int l = 0; l < W; ++l) bits |= uint32_t(uint32_t(a.x[l]) >= b) << l;
    return bits;
  }
  static f keep_bits(f x, uint32_t bits) {
    const i lane = i{1, 2, 4, 8};
    return (lane & int32_t(bits)) != 0 ? x : all(0.f);
  }
  static void transpose(const float* src, long ld, float* dst, long ldd) {
    for (int r = 0; r < 4; ++r)
      for (int c = 0; c < 4; ++c) dst[c * ldd + r] = src[r * ld + c];
  }
};

}  // namespace
