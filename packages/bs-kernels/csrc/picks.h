// The blocks with the largest scores of every row.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "call.h"
#include "forms.h"
#include "team.h"

namespace {

template <class V>  // of the engine that this is compiled for
class Best {
 public:
  explicit Best(const bsa_best& c) : c_(c) {}

  int run() const {
    Counter work;
    const bool small = c_.rows * c_.columns < 1L << 15;  // waking threads would cost more
    run_team(small ? 1 : c_.num_threads, [&](int thread) {
      int32_t* const keys = c_.scratch + thread * c_.columns;
      for (long from; (from = kRows * work.take()) < c_.rows;)
        for (long r = from; r < std::min(from + kRows, c_.rows); ++r) row(r, keys);
    });
    return BSA_OK;
  }

 private:
  static constexpr long kRows = 16;  // taken together

  void row(long r, int32_t* keys) const {
    const long n = c_.columns, wanted = std::min<long>(std::max<long>(c_.counts[r], 0), std::min<long>(c_.slots, n));
    int64_t* const out = c_.picked + r * c_.slots;
    std::fill(out + wanted, out + c_.slots, n - 1);
    if (!wanted) return;
    const float* const scores = c_.scores + r * n;
    for (long i = 0; i < n; ++i) keys[i] = key(scores[i]);
    // Bit by bit, the largest bound that at least `wanted` keys reach.
    uint32_t bits = 0;
    int32_t least = INT32_MIN;
    long reach = n;
    for (int bit = 31; bit >= 0 && reach != wanted; --bit) {
      const int32_t more = int32_t((bits | 1u << bit) ^ 1u << 31);
      const long count = n - below(keys, n, more);
      if (count >= wanted) bits |= 1u << bit, reach = count, least = more;
    }
    // Of those that equal the bound, as many as are wanted beside the larger ones.
    long ties = wanted;
    if (reach != wanted) ties -= reach - equal(keys, n, least);
    for (long i = 0, w = 0; w < wanted; ++i)
      if (keys[i] > least || (keys[i] == least && ties-- > 0)) out[w++] = i;
  }

  // In the order of the floats, -0 as 0, NaN above all.
  static BSA_INLINE int32_t key(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = bits == INT32_MIN ? 0 : bits;
    return x != x ? INT32_MAX : bits ^ ((bits >> 31) & INT32_MAX);
  }

  static BSA_INLINE long below(const int32_t* keys, long n, int32_t bound) {
    int32_t count = 0;
    for (long i = 0; i < n; ++i) count += keys[i] < bound;
    return count;
  }

  static BSA_INLINE long equal(const int32_t* keys, long n, int32_t bound) {
    int32_t count = 0;
    for (long i = 0; i < n; ++i) count += keys[i] == bound;
    return count;
  }

  const bsa_best& c_;
};

}  // namespace
