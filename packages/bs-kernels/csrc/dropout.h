// Dropout keyed by position: word 0 of Philox4x32-10 with the seed as key and (batch, head, query, key) as counter.
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once
#include "call.h"

namespace {

class Dropout {
 public:
  explicit Dropout(const bsa_call& c)
      : on(c.dropout_seed != nullptr),
        scale(on ? c.dropout_scale : 1.f),
        threshold_(c.dropout_threshold),
        batch_(uint32_t(c.first_batch)),
        head_(uint32_t(c.first_head)) {
    if (!on) return;
    uint32_t low = uint32_t(*c.dropout_seed), high = uint32_t(uint64_t(*c.dropout_seed) >> 32);
    for (int r = 0; r < 10; ++r, low += 0x9E3779B9u, high += 0xBB67AE85u) low_[r] = low, high_[r] = high;
  }

  // bits[n][j]: which of the W queries from query0 + j W keep key key0 + n. Positions count modulo 2^32.
  template <class V, int MV>
  __attribute__((noinline)) void keep(long b, long h, long query0, long key0, long rows, uint32_t* bits) const {
    // Of the first rounds most depends on the query or the key alone. Words are named after their index and round.
    const uint64_t product = uint64_t(batch_ + uint32_t(b)) * kA;
    typename V::words x0_query[MV], high_query[MV], low_query[MV], x3[MV];
    for (int j = 0; j < MV; ++j) {
      uint32_t query[V::W];
      for (int l = 0; l < V::W; ++l) query[l] = uint32_t(query0) + uint32_t(j * V::W + l);
      const typename V::words none = V::all_words(0), first = V::multiply(V::load_words(query), kB);
      const typename V::words x0 = V::exclusive(V::high(first), V::all_words((head_ + uint32_t(h)) ^ low_[0]), none);
      const typename V::words second = V::multiply(x0, kA);
      const typename V::words third = V::multiply(V::exclusive(V::high(second), V::all_words(uint32_t(product) ^ high_[1]), none), kB);
      x0_query[j] = V::exclusive(first, V::all_words(low_[1]), none);
      x3[j] = V::exclusive(second, V::all_words(high_[2]), none);
      high_query[j] = V::exclusive(V::high(third), V::all_words(low_[2]), none);
      low_query[j] = third;
    }
    for (long n = 0; n < rows; ++n, bits += MV) {
      const uint64_t of_key = uint64_t(uint32_t(product >> 32) ^ uint32_t(key0 + n) ^ high_[0]) * kB;
      const typename V::words none = V::all_words(0), upper = V::all_words(uint32_t(of_key >> 32)), lower = V::all_words(uint32_t(of_key));
      for (int j = 0; j < MV; ++j) {
        const typename V::words a = V::multiply(V::exclusive(x0_query[j], upper, none), kA);
        typename V::words x0 = V::exclusive(high_query[j], lower, none), x1 = low_query[j];
        typename V::words x2 = V::exclusive(V::high(a), x3[j], none), last = a;
#pragma GCC unroll 6
        for (int r = 3; r < 9; ++r) {
          const typename V::words p0 = V::multiply(x0, kA), p1 = V::multiply(x2, kB);
          x0 = V::exclusive(V::high(p1), x1, V::all_words(low_[r]));
          x2 = V::exclusive(V::high(p0), last, V::all_words(high_[r]));
          x1 = p1, last = p0;
        }
        x0 = V::exclusive(V::high(V::multiply(x2, kB)), x1, V::all_words(low_[9]));
        bits[j] = V::at_least(x0, threshold_);
      }
    }
  }

  const bool on;
  const float scale;  // 1 / (1 - p), or 1

 private:
  static constexpr uint32_t kA = 0xD2511F53u, kB = 0xCD9E8D57u;
  uint32_t threshold_, batch_, head_, low_[10], high_[10];
};

}  // namespace
