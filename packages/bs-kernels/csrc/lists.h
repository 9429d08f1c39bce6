// The lists of a plan whose rows were picked one by one: see bs_kernels.batched_lists, whose results these are.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>

#include "call.h"
#include "team.h"

namespace {

class Lists {
 public:
  explicit Lists(const bsa_lists& c) : c_(c) {}

  int run() const {
    const long heads = c_.heads, slots = c_.slots, per_head = c_.q_blocks * slots;
    *c_.unclear = 0;
    const int threads = heads * per_head < 1L << 14 ? 1 : c_.num_threads;  // waking more would cost more
    each_head(threads, [&](long h) {
      std::fill_n(c_.col_end + h * c_.kv_blocks, c_.kv_blocks, 0);
      for (long i = 0; i < c_.q_blocks; ++i) row(h, i);
    });
    // Columns of all heads lie one after another, and after them the slots that no row uses.
    long used = 0;
    for (long x = 0; x < heads * c_.kv_blocks; ++x) {
      const long count = c_.col_end[x];
      c_.col_begin[x] = c_.col_end[x] = int32_t(used);
      used += count;
    }
    long unused = used;
    for (long h = 0; h < heads; ++h) {
      c_.scratch[h] = int32_t(unused);
      for (long r = h * c_.q_blocks; r < (h + 1) * c_.q_blocks; ++r) unused += slots - (c_.row_end[r] - c_.row_begin[r]);
    }
    each_head(threads, [&](long h) { transpose(h); });
    longest_first(c_.row_begin, c_.row_end, heads * c_.q_blocks, slots, c_.row_order);
    longest_first(c_.col_begin, c_.col_end, heads * c_.kv_blocks, c_.q_blocks, c_.col_order);
    return BSA_OK;
  }

 private:
  template <class F>
  void each_head(int threads, const F& body) const {
    Counter work;
    run_team(threads, [&](int) {
      for (long h; (h = work.take()) < c_.heads;) body(h);
    });
  }

  // Keeps what lies in range and under the mask, by column.
  void row(long h, long i) const {
    const long r = h * c_.q_blocks + i, begin = r * c_.slots;
    const long first = c_.q_start[i], last = first + c_.q_bounds[i + 1] - c_.q_bounds[i] - 1;
    const int64_t* const picked = c_.picked + begin;
    int32_t* const order = c_.entries + begin;
    const long given = std::min<long>(std::max<long>(c_.counts[r], 0), c_.slots);
    bool rising = given == c_.counts[r];
    for (long s = given; s < c_.slots; ++s) order[s] = int32_t(s);
    // Those that are left out fill the places before these from the end, and are turned round below.
    long kept = 0, left = given;
    for (long s = 0; s < given; ++s) {
      const int64_t j = picked[s];
      const bool exists = j >= 0 && j < c_.kv_blocks;
      rising = rising && exists && (!s || picked[s - 1] < j);
      if (exists && c_.kv_start[j] - last <= c_.band_hi && last_key(j) - first >= c_.band_lo)
        order[kept++] = int32_t(s);
      else
        order[--left] = int32_t(s);
    }
    std::reverse(order + left, order + given);
    if (!rising) {
      __atomic_store_n(c_.unclear, 1, __ATOMIC_RELAXED);
      std::sort(order, order + kept, [&](int32_t a, int32_t b) { return picked[a] != picked[b] ? picked[a] < picked[b] : a < b; });
    }
    int32_t* const columns = c_.col_end + h * c_.kv_blocks;
    for (long s = 0; s < c_.slots; ++s) {
      const bool in = s < kept;
      const int64_t j = in ? picked[order[s]] : c_.kv_blocks - 1;
      c_.indices[begin + s] = int32_t(j);
      c_.partial[begin + s] = in && (c_.kv_start[j] - last < c_.band_lo || last_key(j) - first > c_.band_hi);
      order[s] += int32_t(begin);
      if (in) ++columns[j];
    }
    c_.row_begin[r] = int32_t(begin);
    c_.row_end[r] = int32_t(begin + kept);
  }

  int64_t last_key(long j) const { return int64_t(c_.kv_start[j]) + c_.kv_bounds[j + 1] - c_.kv_bounds[j] - 1; }

  void transpose(long h) const {
    int32_t* const columns = c_.col_end + h * c_.kv_blocks;
    int32_t unused = c_.scratch[h];
    for (long i = 0; i < c_.q_blocks; ++i) {
      const long r = h * c_.q_blocks + i;
      for (long s = c_.row_begin[r]; s < (r + 1) * c_.slots; ++s) {
        const int32_t to = s < c_.row_end[r] ? columns[c_.indices[s]]++ : unused++;
        c_.t_rows[to] = int32_t(i);
        c_.t_slots[to] = int32_t(s);
      }
    }
  }

  // Runs by falling length, those of one length in their own order: a counting sort. Only rows that repeat a block, which no layout
  // may, make longer runs than `most`.
  void longest_first(const int32_t* begin, const int32_t* end, long runs, long most, int32_t* order) const {
    int32_t* const at = c_.scratch;
    const auto key = [&](long x) { return most - std::min<long>(end[x] - begin[x], most); };
    std::fill_n(at, most + 1, 0);
    for (long x = 0; x < runs; ++x) ++at[key(x)];
    int32_t sum = 0;
    for (long n = 0; n <= most; ++n) sum += std::exchange(at[n], sum);
    for (long x = 0; x < runs; ++x) order[at[key(x)]++] = int32_t(x);
  }

  const bsa_lists& c_;
};

}  // namespace
