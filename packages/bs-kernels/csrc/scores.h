// Scores of (query block, key block) pairs: products of what pooling left of them, see bs_kernels.block_scores.
#pragma once
#include "problem.h"

namespace {

template <class V>
class Scores {
 public:
  explicit Scores(const bsa_scores& c)
      : c_(c), parts_(c.means + 2 * c.extremes), bounded_(round_up(parts_ * c.dim, BSA_LANES)),
        depth_(bounded_ + round_up(c.rank, BSA_LANES)), lanes_(round_up(c.kv_blocks, BSA_LANES)) {}

  int run() const {
    if (parts_ < 1 || c_.kv_parts < (c_.extremes ? 3 : 1) || c_.workspace_floats < panels() + c_.num_threads * per_thread())
      return BSA_BAD_ARGUMENT;
    const long chunks = (lanes_ + kLanes - 1) / kLanes, rows = (c_.q_blocks + kRows - 1) / kRows;
    Counter packing, work;
    run_team(c_.num_threads, [&](int thread) {
      for (long x; (x = packing.take()) < c_.batch * c_.kv_heads * chunks;)
        pack(x / chunks, x % chunks * kLanes, c_.workspace + panels() + thread * per_thread());
    });
    run_team(c_.num_threads, [&](int thread) {
      for (long x; (x = work.take()) < c_.batch * c_.q_heads * rows;)
        score(x / rows, x % rows * kRows, c_.workspace + panels() + thread * per_thread());
    });
    return BSA_OK;
  }

 private:
  static constexpr long kRows = BSA_SCORE_ROWS, kLanes = BSA_SCORE_LANES;

  long panels() const { return c_.batch * c_.kv_heads * depth_ * lanes_; }
  long per_thread() const { return kRows * (depth_ + kLanes); }

  // Factors of up to kLanes key blocks: lane by lane the parts that are read, then the embedding.
  void pack(long of, long first, float* scratch) const {
    for (long l = first; l < std::min(first + kLanes, lanes_); l += V::W) {
      for (long r = 0; r < V::W; ++r) {
        float* const row = scratch + r * depth_;
        std::fill(row, row + depth_, 0.f);
        const long block = of * c_.kv_blocks + l + r;
        if (l + r >= c_.kv_blocks) continue;
        const float* const pooled = c_.keys + block * c_.kv_parts * c_.dim;
        std::copy_n(c_.means ? pooled : pooled + c_.dim, parts_ * c_.dim, row);
        std::copy_n(c_.g + block * c_.rank, c_.rank, row + bounded_);
      }
      for (long x = 0; x < depth_; x += V::W) V::transpose(scratch + x, depth_, c_.workspace + (of * depth_ + x) * lanes_ + l, lanes_);
    }
  }

  void score(long of, long from, float* scratch) const {
    const long head = of % c_.q_heads, b = of / c_.q_heads, count = std::min(kRows, c_.q_blocks - from);
    const float* const panel = c_.workspace + (b * c_.kv_heads + head / (c_.q_heads / c_.kv_heads)) * depth_ * lanes_;
    float* const tile = scratch + kRows * depth_;
    for (long r = 0; r < count; ++r) factors(of * c_.q_blocks + from + r, head, scratch + r * depth_);
    for (long l = 0; l < lanes_; l += kLanes) {
      const long width = std::min(kLanes, lanes_ - l), real = std::min(width, c_.kv_blocks - l);
      product_lanes<V, Walk::Rows, Into::Set>(int(width / V::W), count, depth_, scratch, depth_ * 4, panel + l, lanes_, tile, kLanes);
      for (long r = 0; r < count; ++r) {
        const float* const distance = c_.distance + (from + r) * c_.kv_blocks + l;
        float* const out = c_.scores + (of * c_.q_blocks + from + r) * c_.kv_blocks + l;
        for (long i = 0; i < real; ++i) out[i] = tile[r * kLanes + i] + c_.slope[head] * distance[i];
      }
    }
  }

  // Of one query block, in the order of `pack`.
  void factors(long block, long head, float* row) const {
    const float* const mean = c_.queries + block * c_.q_parts * c_.dim;
    const float alike = c_.gain[2 * head] * c_.scale, bound = c_.gain[2 * head + 1] * c_.scale;
    std::fill(row, row + depth_, 0.f);
    if (c_.means)
      for (long i = 0; i < c_.dim; ++i) row[i] = mean[i] * alike;
    if (c_.extremes) {
      float* const above = row + (parts_ - 2) * c_.dim;
      for (long i = 0; i < c_.dim; ++i) {
        const float x = mean[i] < 0 ? 0.f : mean[i];  // NaN stays
        above[i] = x * bound;
        above[c_.dim + i] = (mean[i] - x) * bound;
      }
    }
    std::copy_n(c_.f + block * c_.rank, c_.rank, row + bounded_);
  }

  const bsa_scores& c_;
  const long parts_, bounded_, depth_, lanes_;
};

template <class V>
int run_scores_on(const bsa_scores& c) {
  if constexpr (V::PAIR == 1 && !V::TILES) return Scores<V>(c).run();
  (void)c;
  return BSA_NO_ISA;
}

}  // namespace
