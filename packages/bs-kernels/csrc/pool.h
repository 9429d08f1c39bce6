// Mean, maximum and minimum of every key block, feature by feature, in one pass over the keys.
#pragma once
#include <algorithm>

#include "problem.h"

namespace {

template <class V>
class Pool {
 public:
  explicit Pool(const bsa_call& c) : c_(c), parts_(c.v_dim / c.dim) {}

  int run() const {
    if (parts_ < 1 || parts_ > 3 || parts_ * c_.dim != c_.v_dim || c_.result_dtype != BSA_F32) return BSA_BAD_ARGUMENT;
    const long items = c_.batch * c_.kv_blocks;
    Counter work;
    const bool small = c_.batch * c_.kv_len * c_.kv_heads * c_.dim < 1L << 17;  // waking threads would cost more
    run_team(small ? 1 : c_.num_threads, [&](int) {
      for (long x; (x = work.take()) < items;) {
        const long b = x / c_.kv_blocks, j = x % c_.kv_blocks;
        if (parts_ == 1) block<1>(b, j);
        if (parts_ == 2) block<2>(b, j);
        if (parts_ == 3) block<3>(b, j);
      }
    });
    return BSA_OK;
  }

 private:
  // Features of one group of heads: their running values stay in the nearest cache.
  static constexpr long kWidth = 512;
  static constexpr long kAhead = 8;   // tokens asked for ahead: several rows at once are no stream to the hardware
  static constexpr long kTokens = 4;  // read together, so that running values are loaded and stored once for all of them

  template <int P>
  void block(long b, long j) const {
    const long step = std::min(c_.dim, kWidth), heads = kWidth / step;
    for (long h = 0; h < c_.kv_heads; h += heads)
      for (long d = 0; d < c_.dim; d += step)
        group<P>(b, j, h, std::min(heads, c_.kv_heads - h), d, std::min(step, c_.dim - d));
  }

  // `width` features from the d-th of `heads` heads from the h-th. Heads of a token are neighbours, so memory is read in order.
  template <int P>
  void group(long b, long j, long h, long heads, long d, long width) const {
    float sum[kWidth + V::W], top[kWidth + V::W], low[kWidth + V::W];  // the lowest, negated
    const long from = c_.kv_bounds[j], to = c_.kv_bounds[j + 1];
    const long size = element_size(c_.dtype), stride = c_.k.token * size;
    std::fill(sum, sum + heads * width, 0.f);
    std::fill(top, top + heads * width, -kInf);
    std::fill(low, low + heads * width, -kInf);
    for (long t = from; t < to; t += kTokens) {
      const char* first = at(c_.k, c_.dtype, b, t, h) + d * size;
      for (long n = 0; n < heads; ++n) {
        const char* row = first + n * c_.k.head * size;
        const long at = n * width;
        if (to - t >= kTokens)
          tokens<P, kTokens>(row, stride, width, sum + at, top + at, low + at);
        else
          for (long u = 0; u < to - t; ++u) tokens<P, 1>(row + u * stride, stride, width, sum + at, top + at, low + at);
      }
    }
    const float share = to > from ? 1.f / float(to - from) : 0.f;
    for (long n = 0; n < heads; ++n) {
      float* out = static_cast<float*>(c_.out.data) + b * c_.out.batch + j * c_.out.token + (h + n) * c_.out.head + d;
      for (long i = 0; i < width; ++i) {
        const long x = n * width + i;
        out[i] = sum[x] * share;
        if (P > 1) out[c_.dim + i] = to > from ? top[x] : 0.f;
        if (P > 2) out[2 * c_.dim + i] = to > from ? -low[x] : 0.f;
      }
    }
  }

  // Adds N tokens to the running values of `width` features.
  template <int P, int N>
  BSA_INLINE void tokens(const char* row, long stride, long width, float* sum, float* top, float* low) const {
    const long size = element_size(c_.dtype), whole = width / V::W * V::W;
    for (long i = 0; i < whole; i += V::W) {
      typename V::f x[N];
      for (int u = 0; u < N; ++u) {
        __builtin_prefetch(row + (u + kAhead) * stride + i * size);
        x[u] = widen<V>(row + u * stride + i * size, c_.dtype);
      }
      fold<P, N>(x, sum + i, top + i, low + i);
    }
    if (whole == width) return;
    typename V::f x[N];
    float rest[V::W], running[3][V::W];
    for (int u = 0; u < N; ++u) {
      widen_row<V>(row + u * stride + whole * size, c_.dtype, width - whole, rest, V::W);
      x[u] = V::load(rest);
    }
    float* const all[3] = {sum + whole, top + whole, low + whole};
    for (int p = 0; p < P; ++p) std::copy(all[p], all[p] + (width - whole), running[p]), std::fill(running[p] + (width - whole), running[p] + V::W, 0.f);
    fold<P, N>(x, running[0], running[1], running[2]);
    for (int p = 0; p < P; ++p) std::copy(running[p], running[p] + (width - whole), all[p]);
  }

  template <int P, int N>
  static BSA_INLINE void fold(const typename V::f (&x)[N], float* sum, float* top, float* low) {
    typename V::f s = V::load(sum);
    for (int u = 0; u < N; ++u) s = V::add(s, x[u]);
    V::store(sum, s);
    if (P > 1) {
      typename V::f m = V::load(top);
      for (int u = 0; u < N; ++u) m = V::max(m, x[u]);
      V::store(top, m);
    }
    if (P > 2) {
      typename V::f m = V::load(low);
      for (int u = 0; u < N; ++u) m = V::max(m, V::sub(V::all(0.f), x[u]));
      V::store(low, m);
    }
  }

  const bsa_call& c_;
  const long parts_;
};

}  // namespace
