// Forward: one task per (batch, head, run of queries of one row); scores and running softmax never leave the cache.
#pragma once
#include "dropout.h"
#include "problem.h"

namespace {

struct ForwardTask {
  int32_t b, h, row, first, count;
};

template <class V>
class Forward {
 public:
  explicit Forward(const bsa_call& c)
      : c_(c), layout_(c), drop_(c), keys_(c, c.k, c.dim, Operand<V>::Natural), values_(c, c.v, c.v_dim, Operand<V>::Paired) {}

  int run(int64_t* need) {
    threads_ = c_.num_threads;
    depth_ = units<V>(c_.dim);
    d_pad_ = round_up(depth_, V::W);
    v_pad_ = round_up(c_.v_dim, V::W);
    const long tasks = count_tasks();
    const long own = kTiles * (d_pad_ + v_pad_ + 2) * L + kKeys * L + 2 * L + V::W * (d_pad_ > v_pad_ ? d_pad_ : v_pad_);
    own_ = round_up(own, 16);
    Arena arena;
    arena.plan(tasks * long(sizeof(ForwardTask)));
    arena.plan(threads_ * own_ * 4);
    arena.plan(keys_.bytes());
    arena.plan(values_.bytes());
    arena.plan(KeyBlocks::bytes(c_) + 256);
    if (need) {
      *need = arena.size();
      return BSA_OK;
    }
    if (!arena.open(c_)) return BSA_BAD_ARGUMENT;
    ForwardTask* list = arena.take<ForwardTask>(tasks);
    float* space = arena.take<float>(threads_ * own_);
    keys_.use(arena.take<float>(keys_.bytes() / 4));
    values_.use(arena.take<float>(values_.bytes() / 4));
    info_.take(c_, arena);
    list_tasks(list);

    Counter packs, work;
    Preparation<V> preparation(c_, info_, {&keys_, &values_});
    run_team(threads_, [&](int thread) {
      const TileRegion<V> tiles;
      if (preparation.items()) {
        for (long x; (x = packs.take()) < preparation.items();) preparation.item(x);
        if (threads_ > 1) barrier();
      }
      for (long x; (x = work.take()) < tasks;) task(list[x], space + thread * own_);
    });
    return BSA_OK;
  }

 private:
  static constexpr long L = 2 * V::W;

  struct Tile : Queries<V> {
    float *panel, *out, *top, *sum;
    bool first;
  };

  long count_tasks() const {
    long n = 0;
    for (long i = 0; i < c_.q_blocks; ++i) n += (layout_.q_size(i) + kTiles * L - 1) / (kTiles * L);
    return n * c_.batch * c_.q_heads;
  }

  // Head after head, so that the keys of one stay in the cache; within a head the plan's order (longest first).
  void list_tasks(ForwardTask* list) const {
    const long heads = c_.layouts * c_.layout_heads, rows = heads * c_.q_blocks;
    ForwardTask* p = list;
    for (long b = 0; b < c_.batch; ++b)
      for (long h = 0; h < c_.q_heads; ++h) {
        const long own = layout_.head(b, h);
        for (long x = 0; x < rows; ++x) {
          const long r = c_.row_order[x];
          if (heads > 1 && r / c_.q_blocks != own) continue;
          const long i = r - own * c_.q_blocks;
          for (long t = c_.q_bounds[i]; t < c_.q_bounds[i + 1]; t += kTiles * L) {
            const long n = c_.q_bounds[i + 1] - t;
            *p++ = {int32_t(b), int32_t(h), int32_t(i), int32_t(t), int32_t(n < kTiles * L ? n : kTiles * L)};
          }
        }
      }
  }

  void task(const ForwardTask& t, float* space) {
    Tile tiles[kTiles];
    float* scratch = space;
    space += V::W * (d_pad_ > v_pad_ ? d_pad_ : v_pad_);
    float* scores = space;
    space += kKeys * L;
    float* peak = space;
    space += 2 * L;
    int used = 0;
    for (long q = 0; q < t.count; q += L) {
      Tile& tile = tiles[used++];
      tile.set(c_, t.b, t.h, t.row, t.first + q, t.count - q < L ? t.count - q : L);
      tile.panel = space;
      tile.out = tile.panel + d_pad_ * L;
      tile.top = tile.out + v_pad_ * L;
      tile.sum = tile.top + L;
      space = tile.sum + L;
      tile.first = true;
      load_panel<V>(at(c_.q, c_.dtype, t.b, tile.token, t.h), c_.q.token * element_size(c_.dtype), c_.dtype, tile.count, c_.dim,
                    tile.panel, tile.lanes(), scratch);
      for (long l = 0; l < L; ++l) {
        tile.top[l] = c_.sinks ? c_.sinks[t.h] : -kInf;
        tile.sum[l] = tile.top[l] > -kInf ? 1.f : 0.f;
      }
    }

    const long row = layout_.row(t.b, t.h, t.row), kv_head = t.h / layout_.group();
    for (long s = c_.row_begin[row]; s < c_.row_end[row]; ++s)
      each_piece(c_, s, [&](const Keys& keys) {
        for (int x = 0; x < used; ++x) {
          if (tiles[x].vectors == 2)
            visit<2>(tiles[x], kv_head, keys, scores, peak);
          else
            visit<1>(tiles[x], kv_head, keys, scores, peak);
        }
      });
    for (int x = 0; x < used; ++x) finish(tiles[x], scratch);
  }

  template <int MV>
  void visit(Tile& tile, long kv_head, Keys keys, float* scores, float* peak) {
    constexpr long lanes = MV * V::W;
    TileMask mask;
    if (!clip<V>(c_, info_, tile, keys, mask)) return;
    for (long l = 0; l < lanes; ++l) peak[l] = -kInf;
    product<V, MV, Walk::Rows, Into::Score>(keys.count, depth_, keys_.block(tile.b, kv_head, keys.block, keys.offset),
                                            keys_.row_bytes(), tile.panel, lanes, scores, lanes, c_.scale, bias_of(c_, tile.b, tile.h, keys.slot),
                                            peak);
    if (mask.any()) mask_scores<V, MV>(scores, keys.count, mask, peak);
    long rows = keys.count;
    for (; rows % kKeyStep<V>; ++rows)
      for (long l = 0; l < lanes; ++l) scores[rows * lanes + l] = -kInf;
    if (drop_.on) {
      uint32_t keep[kKeys * MV];
      drop_.keep<V, MV>(tile.b, tile.h, mask.query0, mask.key0, rows, keep);
      softmax_step<V, MV, true>(scores, rows, peak, tile.top, tile.sum, tile.out, c_.v_dim, tile.first, keep);
    } else {
      softmax_step<V, MV, false>(scores, rows, peak, tile.top, tile.sum, tile.out, c_.v_dim, tile.first, nullptr);
    }
    const char* v = values_.block(tile.b, kv_head, keys.block, keys.offset);
    if (tile.first)
      product<V, MV, Walk::Columns, Into::Set>(c_.v_dim, rows / V::PAIR, v, values_.row_bytes(), scores, lanes, tile.out, lanes);
    else
      product<V, MV, Walk::Columns, Into::Add>(c_.v_dim, rows / V::PAIR, v, values_.row_bytes(), scores, lanes, tile.out, lanes);
    tile.first = false;
  }

  void finish(Tile& tile, float* scratch) {
    const long lanes = tile.lanes();
    if (tile.first) std::memset(tile.out, 0, size_t(v_pad_ * lanes) * 4);
    float* lse = c_.lse + (tile.b * c_.q_heads + tile.h) * c_.q_len + tile.token;
    float factor[L];
    for (long l = 0; l < tile.count; ++l) {
      const float sum = tile.sum[l];
      factor[l] = sum == 0.f ? 0.f : drop_.scale / sum;
      lse[l] = sum == 0.f ? -kInf : tile.top[l] + __builtin_logf(sum);
    }
    bsa_tensor out = c_.out;
    store_panel<V>(tile.out, lanes, factor, tile.count, c_.v_dim, at(out, c_.result_dtype, tile.b, tile.token, tile.h),
                   out.token * element_size(c_.result_dtype), c_.result_dtype, scratch);
  }

  const bsa_call& c_;
  Layout layout_;
  Dropout drop_;
  Operand<V> keys_, values_;
  KeyBlocks info_;
  int threads_ = 1;
  long depth_ = 0, d_pad_ = 0, v_pad_ = 0, own_ = 0;
};

}  // namespace
