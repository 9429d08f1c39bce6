// Moving rows between tensors and the operand layouts of tile.h: conversion, padding, transposition.
#pragma once
#include <cstring>

#include "call.h"
#include "tile.h"

namespace {

inline long round_up(long n, long to) { return (n + to - 1) / to * to; }
inline long element_size(int dtype) { return dtype == BSA_F32 ? 4 : 2; }

// 32-bit operands that hold n elements.
template <class V>
constexpr long units(long n) {
  return (n + V::PAIR - 1) / V::PAIR;
}

// Keys that a product over keys takes at a time: a pair, or a tile.
template <class V>
constexpr long kKeyStep = V::TILES ? 32 : V::PAIR;

// W elements -> f32.
template <class V>
BSA_INLINE typename V::f widen(const void* src, int dtype) {
  if (dtype == BSA_F32) return V::load(static_cast<const float*>(src));
  const uint16_t* p = static_cast<const uint16_t*>(src);
  if (dtype == BSA_F16) return V::from_half(p);
  uint32_t bits[V::W];
  for (int l = 0; l < V::W; ++l) bits[l] = uint32_t(p[l]) << 16;
  float wide[V::W];
  std::memcpy(wide, bits, sizeof wide);
  return V::load(wide);
}

// Row of `n` elements -> f32, zero padded to `padded`.
template <class V>
BSA_INLINE void widen_row(const void* src, int dtype, long n, float* dst, long padded) {
  if (dtype == BSA_F32) {
    std::memcpy(dst, src, size_t(n) * 4);
  } else if (dtype == BSA_BF16) {
    const uint16_t* p = static_cast<const uint16_t*>(src);
    for (long i = 0; i < n; ++i) {
      const uint32_t bits = uint32_t(p[i]) << 16;
      std::memcpy(dst + i, &bits, 4);
    }
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(src);
    long i = 0;
    for (; i + V::W <= n; i += V::W) V::store(dst + i, V::from_half(p + i));
    if (i < n) {
      uint16_t tail[V::W] = {};
      float wide[V::W];
      std::memcpy(tail, p + i, size_t(n - i) * 2);
      V::store(wide, V::from_half(tail));
      std::memcpy(dst + i, wide, size_t(n - i) * 4);
    }
  }
  std::memset(dst + n, 0, size_t(padded - n) * 4);
}

// Row of `n` elements -> operands, zero padded to `padded` operands. PAIR 2 keeps bf16; otherwise the row becomes f32.
template <class V>
BSA_INLINE void load_row(const void* src, int dtype, long n, float* dst, long padded) {
  if constexpr (V::PAIR == 2) {
    std::memcpy(dst, src, size_t(n) * 2);
    std::memset(reinterpret_cast<char*>(dst) + n * 2, 0, size_t(padded * 4 - n * 2));
  } else {
    widen_row<V>(src, dtype, n, dst, padded);
  }
}

// f32 values times `factor` -> a row of `dtype`, rounded to nearest even.
template <class V>
BSA_INLINE void store_row(const float* src, float factor, int dtype, long n, void* dst) {
  const typename V::f by = V::all(factor);
  long i = 0;
  if (dtype == BSA_F32) {
    float* p = static_cast<float*>(dst);
    for (; i + V::W <= n; i += V::W) V::store(p + i, V::mul(V::load(src + i), by));
    for (; i < n; ++i) p[i] = src[i] * factor;
  } else if (dtype == BSA_BF16) {
    uint16_t* p = static_cast<uint16_t*>(dst);
    if constexpr (V::PAIR == 2)
      for (; i + V::W <= n; i += V::W) V::store_bf16(p + i, V::mul(V::load(src + i), by));
    for (; i < n; ++i) {
      const float x = src[i] * factor;
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      const uint32_t quiet = (bits >> 16) | 0x40;
      p[i] = uint16_t((bits & 0x7fffffff) > 0x7f800000u ? quiet : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
  } else {
    uint16_t* p = static_cast<uint16_t*>(dst);
    for (; i + V::W <= n; i += V::W) V::to_half(p + i, V::mul(V::load(src + i), by));
    if (i < n) {
      float wide[V::W] = {};
      uint16_t tail[V::W];
      for (long x = i; x < n; ++x) wide[x - i] = src[x] * factor;
      V::to_half(tail, V::load(wide));
      std::memcpy(p + i, tail, size_t(n - i) * 2);
    }
  }
}

// `count` rows of `n` elements, `row_bytes` apart -> panel[operand][lane] of `lanes` lanes; missing lanes are zero.
// `scratch` holds W rows of round_up(units, W) operands.
template <class V>
void load_panel(const char* src, long row_bytes, int dtype, long count, long n, float* panel, long lanes, float* scratch) {
  const long u = units<V>(n), padded = round_up(u, V::W);
  for (long l = 0; l < lanes; l += V::W) {
    for (long r = 0; r < V::W; ++r) {
      if (l + r < count)
        load_row<V>(src + (l + r) * row_bytes, dtype, n, scratch + r * padded, padded);
      else
        std::memset(scratch + r * padded, 0, size_t(padded) * 4);
    }
    for (long x = 0; x < padded; x += V::W) V::transpose(scratch + x, padded, panel + x * lanes + l, lanes);
  }
}

// The same from rows that load_rows_paired has already brought to f32 (PAIR 1); clears the missing ones.
template <class V>
void transpose_rows(float* rows, long padded, long count, float* panel, long lanes) {
  if (count < lanes) std::memset(rows + count * padded, 0, size_t((lanes - count) * padded) * 4);
  for (long l = 0; l < lanes; l += V::W)
    for (long x = 0; x < padded; x += V::W) V::transpose(rows + l * padded + x, padded, panel + x * lanes + l, lanes);
}

// panel[value][lane] in f32, times factor[lane] -> `count` rows of `n` elements.
template <class V>
void store_panel(const float* panel, long lanes, const float* factor, long count, long n, char* dst, long row_bytes, int dtype,
                 float* scratch) {
  const long padded = round_up(n, V::W);
  for (long l = 0; l < lanes && l < count; l += V::W) {
    for (long x = 0; x < padded; x += V::W) V::transpose(panel + x * lanes + l, lanes, scratch + x, padded);
    for (long r = 0; r < V::W && l + r < count; ++r)
      store_row<V>(scratch + r * padded, factor[l + r], dtype, n, dst + (l + r) * row_bytes);
  }
}

// Interleaves pairs of rows for PAIR 2: out[r / 2][x] = (row r[x], row r + 1[x]); a missing last row is zero. `n` elements,
// out rows of `ld` operands (zero padded). For PAIR 1 this is a copy to f32 rows.
template <class V>
void load_rows_paired(const char* src, long row_bytes, int dtype, long count, long n, float* out, long ld) {
  if constexpr (V::PAIR == 1) {
    for (long r = 0; r < count; ++r) load_row<V>(src + r * row_bytes, dtype, n, out + r * ld, ld);
  } else {
    for (long r = 0; r < count; r += 2, out += ld) {
      const uint16_t* a = reinterpret_cast<const uint16_t*>(src + r * row_bytes);
      const uint16_t* b = reinterpret_cast<const uint16_t*>(src + (r + 1) * row_bytes);
      uint32_t* o = reinterpret_cast<uint32_t*>(out);
      if (r + 1 < count)
        for (long x = 0; x < n; ++x) o[x] = uint32_t(a[x]) | uint32_t(b[x]) << 16;
      else
        for (long x = 0; x < n; ++x) o[x] = a[x];
      std::memset(o + n, 0, size_t(ld - n) * 4);
    }
  }
}

// `count` rows of `n` elements -> the columns operand of matrix tiles: out[row / 32][element][row % 32] in bf16, the elements padded
// to whole tiles; what is missing is zero.
template <class V>
void load_tiles(const char* src, long row_bytes, long count, long n, float* out) {
  const long padded = round_up(n, 16);
  for (long r = 0; r < count; r += 32)
    for (long x = 0; x < padded; x += 16, out += 16 * 16) {
      uint32_t pairs[16][16] = {};  // [pair of rows][element]
      const long width = n - x < 16 ? n - x : 16;
      for (long y = 0; y < 32 && r + y < count; y += 2) {
        uint16_t even[16] = {}, odd[16] = {};
        const char* at = src + (r + y) * row_bytes + 2 * x;
        const bool both = r + y + 1 < count;
        if (width == 16) {
          std::memcpy(even, at, 32);
          if (both) std::memcpy(odd, at + row_bytes, 32);
        } else {
          std::memcpy(even, at, size_t(width) * 2);
          if (both) std::memcpy(odd, at + row_bytes, size_t(width) * 2);
        }
        for (long e = 0; e < 16; ++e) pairs[y / 2][e] = uint32_t(even[e]) | uint32_t(odd[e]) << 16;
      }
      V::transpose(reinterpret_cast<const float*>(pairs), 16, out, 16);
    }
}

}  // namespace
