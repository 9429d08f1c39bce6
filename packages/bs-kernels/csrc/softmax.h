// Exponentials, token masks and the running softmax over a tile of scores S[key][query lane].
#pragma once
#include "tile.h"

namespace {

constexpr float kInf = __builtin_inff();
constexpr float kLog2e = 1.44269504088896340736f;

// 2^x for x <= ~127; exactly 0 at -inf. Minimax polynomials for 2^t on [0, 1), relative error 2e-9 and 7.5e-8 before rounding.
template <class V>
BSA_INLINE typename V::f exp2(typename V::f x) {
  x = V::clamp_exponent(x);
  const typename V::f t = V::frac(x);
  typename V::f p;
  if constexpr (V::PAIR == 1) {
    p = V::fma(t, V::all(0x1.c72118p-13f), V::all(0x1.461954p-10f));
    p = V::fma(t, p, V::all(0x1.3d28p-7f));
    p = V::fma(t, p, V::all(0x1.c685p-5f));
    p = V::fma(t, p, V::all(0x1.ebfd9ep-3f));
    p = V::fma(t, p, V::all(0x1.62e42ap-1f));
    p = V::fma(t, p, V::all(1.f));
  } else {
    p = V::fma(t, V::all(0x1.ec320ap-10f), V::all(0x1.26900cp-7f));
    p = V::fma(t, p, V::all(0x1.c95446p-5f));
    p = V::fma(t, p, V::all(0x1.ebd5a8p-3f));
    p = V::fma(t, p, V::all(0x1.62e4f6p-1f));
    p = V::fma(t, p, V::all(0x1.fffffep-1f));
  }
  return V::scale2(p, x, t);
}

// e^x as 2^(x log2 e): a score that equals its reference gives exactly 2^0.
template <class V>
BSA_INLINE typename V::f exp(typename V::f x) {
  return exp2<V>(V::mul(x, V::all(kLog2e)));
}

// The token mask of one tile: keys key0 ... key0 + rows, queries query0 ... in lanes.
struct TileMask {
  long key0, query0;           // absolute positions
  long band_lo, band_hi;
  bool band;                   // the band cuts into this tile
  const uint8_t* padding;      // of the tile's first key, or null
  const int32_t* key_segment;  // of the tile's first key, or null
  const int32_t* query_segment;
  const char* bias;            // attn_bias of the tile's first pair, or null
  bool bias_is_bool;
  long bias_query, bias_key;   // strides in elements
  long queries;                // lanes that hold a query
  bool any() const { return band || padding || key_segment || bias; }
};

// attn_bias of `count` <= W keys from key n, as pairs[key][lane]; where it is a mask, 0 or -inf.
template <class V, int MV>
__attribute__((noinline)) void load_bias(const TileMask& t, long n, long count, float* pairs) {
  constexpr int L = MV * V::W;
  auto value = [&t](long at) {
    return !t.bias_is_bool ? reinterpret_cast<const float*>(t.bias)[at] : t.bias[at] ? 0.f : -kInf;
  };
  if (t.bias_query == 0) {
    for (long i = 0; i < count; ++i)
      for (int j = 0; j < MV; ++j) V::store(pairs + i * L + j * V::W, V::all(value((n + i) * t.bias_key)));
    return;
  }
  for (int j = 0; j < MV; ++j) {
    float square[V::W * V::W];  // [lane][key]
    for (long l = 0; l < V::W; ++l) {
      const long q = j * V::W + l < t.queries ? j * V::W + l : t.queries - 1, from = q * t.bias_query + n * t.bias_key;
      float* row = square + l * V::W;
      if (t.bias_key == 0)
        V::store(row, V::all(value(from)));
      else if (t.bias_key == 1 && count == V::W && !t.bias_is_bool)
        V::store(row, V::load(reinterpret_cast<const float*>(t.bias) + from));
      else if (t.bias_key == 1 && count == V::W)
        for (long i = 0; i < V::W; ++i) row[i] = t.bias[from + i] ? 0.f : -kInf;
      else
        for (long i = 0; i < V::W; ++i) row[i] = i < count ? value(from + i * t.bias_key) : 0.f;
    }
    V::transpose(square, V::W, pairs + j * V::W, L);
  }
}

BSA_INLINE int clamp_lane(long x, int lanes) { return x < -1 ? -1 : x > lanes ? lanes : int(x); }

// Adds attn_bias, writes -inf over masked scores and recomputes the lane maxima.
template <class V, int MV>
__attribute__((noinline)) void mask_scores(float* s, long rows, const TileMask& t, float* peak) {
  constexpr int L = MV * V::W;
  const typename V::f never = V::all(-kInf);
  typename V::f top[MV];
  float bias[V::W * L];
  for (int j = 0; j < MV; ++j) top[j] = never;
  for (long n = 0; n < rows; ++n) {
    if (t.bias && n % V::W == 0) load_bias<V, MV>(t, n, rows - n < V::W ? rows - n : V::W, bias);
    const long key = t.key0 + n;
    const bool real = !t.padding || t.padding[n];
    const int lo = real ? clamp_lane(key - t.band_hi - t.query0, L) : L;
    const int hi = clamp_lane(key - t.band_lo - t.query0, L);
    for (int j = 0; j < MV; ++j) {
      float* p = s + n * L + j * V::W;
      typename V::f x = V::load(p);
      if (t.bias) {
        const typename V::f b = V::load(bias + n % V::W * L + j * V::W);
        x = t.bias_is_bool ? V::if_equal(b, -kInf, b, x) : V::add(x, b);
      }
      x = V::keep_range(x, lo, hi, j * V::W, never);
      if (t.key_segment) x = V::keep_equal(x, t.query_segment + j * V::W, t.key_segment[n], never);
      V::store(p, x);
      top[j] = V::max(x, top[j]);
    }
  }
  for (int j = 0; j < MV; ++j) V::store(peak + j * V::W, top[j]);
}

// One step of the running softmax. Replaces the scores of `rows` keys by probabilities relative to `top` (for PAIR 2: in bf16,
// pairs of keys interleaved per lane; `rows` is even then). `top` moves only when a score is e^7 above it, so most tiles
// leave the output alone; when it moves, `out` (v_dim rows of lanes) and `sum` are rescaled. With `drops`, probabilities whose
// bit keep[n][j] is not set become 0 after they joined `sum`. A step is summed by itself first, so that rounding grows with the
// number of steps and not with that of keys.
template <class V, int MV, bool drops>
__attribute__((noinline)) void softmax_step(float* s, long rows, const float* peak, float* top, float* sum, float* out, long v_dim,
                                            bool first, const uint32_t* keep) {
  constexpr int L = MV * V::W;
  using f = typename V::f;
  f base[MV], total[MV];
  bool moves = false;
  for (int j = 0; j < MV; ++j)
    moves |= V::any_gt(V::load(peak + j * V::W), V::add(V::load(top + j * V::W), V::all(7.f)));
  for (int j = 0; j < MV; ++j) {
    f t = V::load(top + j * V::W);
    total[j] = V::all(0.f);
    if (moves) {
      // Each lane by itself: a query's result must not depend on its neighbours in the tile, which may come after it.
      const f high = V::load(peak + j * V::W);
      const f over = V::max(V::sub(high, V::add(t, V::all(7.f))), V::all(0.f));  // 0 too where both are -inf
      const f now = V::if_equal(over, 0.f, t, V::max(high, t));
      const f factor = V::if_equal(over, 0.f, V::all(1.f), exp<V>(V::sub(t, now)));
      V::store(top + j * V::W, now);
      V::store(sum + j * V::W, V::mul(V::load(sum + j * V::W), factor));
      if (!first)
        for (long d = 0; d < v_dim; ++d) V::store(out + d * L + j * V::W, V::mul(V::load(out + d * L + j * V::W), factor));
      t = now;
    }
    base[j] = V::if_equal(t, -kInf, V::all(0.f), t);
  }
  if constexpr (V::PAIR == 1) {
    for (long n = 0; n < rows; ++n)
      for (int j = 0; j < MV; ++j) {
        f p = exp<V>(V::sub(V::load(s + n * L + j * V::W), base[j]));
        total[j] = V::add(total[j], p);
        if (drops) p = V::keep_bits(p, keep[n * MV + j]);
        V::store(s + n * L + j * V::W, p);
      }
  } else {
    float* to = s;  // the probabilities of keys n, n + 1 overwrite row n / 2
    for (long n = 0; n < rows; n += 2, to += L)
      for (int j = 0; j < MV; ++j) {
        f even = exp<V>(V::sub(V::load(s + n * L + j * V::W), base[j]));
        f odd = exp<V>(V::sub(V::load(s + (n + 1) * L + j * V::W), base[j]));
        total[j] = V::add(total[j], V::add(even, odd));
        if (drops) even = V::keep_bits(even, keep[n * MV + j]), odd = V::keep_bits(odd, keep[(n + 1) * MV + j]);
        V::store(to + j * V::W, V::pair(even, odd));
      }
  }
  for (int j = 0; j < MV; ++j) V::store(sum + j * V::W, V::add(V::load(sum + j * V::W), total[j]));
}

}  // namespace
