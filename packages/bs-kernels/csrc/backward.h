// Backward from a saved log-sum-exp. With P = e^(S - lse) and dS = P (dP - delta): dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K.
//
// Two ways to split the work. By heads: a thread owns the keys of one (batch, kv head), walks all rows of its query heads, of long
// keys one stretch after the other, and does five products per tile. By blocks: one pass over rows for dQ and one over columns for
// dK and dV, seven products per tile, but as many tasks as there are blocks. Both add the same terms to every gradient in the same
// order: the keys of a row as the plan lists them, for a key first the heads of the group and then rows ascending. So the choice,
// and with it the thread count, never changes bits. A page that several blocks read is summed by blocks, its readers in order.
#pragma once
#include <algorithm>

#include "bias_gradient.h"
#include "dropout.h"
#include "pages.h"
#include "problem.h"

namespace {

enum class Wants { All, Queries, Keys };

template <class V>
class Backward {
 public:
  explicit Backward(const bsa_call& c)
      : c_(c),
        layout_(c),
        drop_(c),
        keys_(c, c.k, c.dim, Operand<V>::Natural),
        keys_paired_(c, c.k, c.dim, Operand<V>::Paired),
        values_(c, c.v, c.v_dim, Operand<V>::Natural),
        bias_(*this) {}

  int run(int64_t* need) {
    bool by_heads = c_.split == BSA_SPLIT_AUTO ? heads_are_faster() : c_.split == BSA_SPLIT_HEADS;
    const long largest = largest_block();
    const long stretch = by_heads ? stretch_tokens(largest) : largest;
    const long kept = by_heads && stretch < c_.kv_len ? layout_.group() * c_.q_len * d_pad_ : 0;
    const long own = round_up(stretch * (d_pad_ + v_pad_) + kept + kTiles * tile_floats() + scratch_floats() +
                                  (by_heads ? c_.kv_blocks / 4 + 1 : 0), 16);
    Arena arena;
    arena.plan(c_.num_threads * own * 4);
    arena.plan(keys_.bytes());
    arena.plan(separate() ? keys_paired_.bytes() : 0);
    arena.plan(values_.bytes());
    arena.plan(KeyBlocks::bytes(c_) + 256);
    arena.plan(PageReaders::bytes(c_));
    arena.plan(bias_.bytes());
    if (need) {
      *need = arena.size();
      return BSA_OK;
    }
    if (!arena.open(c_)) return BSA_BAD_ARGUMENT;
    float* space = arena.take<float>(c_.num_threads * own);
    keys_.use(arena.take<float>(keys_.bytes() / 4));
    if (separate()) keys_paired_.use(arena.take<float>(keys_paired_.bytes() / 4));
    values_.use(arena.take<float>(values_.bytes() / 4));
    info_.take(c_, arena);
    readers_.take(c_, arena);
    readers_.build(c_);
    if (readers_.shared) by_heads = false;
    bias_.use(arena.take<double>(bias_.tasks()));

    Counter packs, rows, columns, biases;
    Preparation<V> preparation(c_, info_, {&keys_, separate() ? &keys_paired_ : nullptr, &values_});
    const long heads = c_.batch * c_.kv_heads, row_tasks = c_.batch * c_.q_heads * c_.q_blocks;
    const long column_tasks = c_.page_table ? c_.kv_heads * readers_.count : heads * c_.kv_blocks;
    run_team(c_.num_threads, [&](int thread) {
      const TileRegion<V> tiles;
      Space s(*this, space + thread * own, stretch, kept);
      if (preparation.items()) {
        for (long x; (x = packs.take()) < preparation.items();) preparation.item(x);
        if (c_.num_threads > 1) barrier();
      }
      if (by_heads) {
        for (long x; (x = columns.take()) < heads;) head_task(x / c_.kv_heads, x % c_.kv_heads, stretch, s);
      } else {
        for (long x; (x = rows.take()) < row_tasks;) row_task(x, s);
        for (long x; (x = columns.take()) < column_tasks;) c_.page_table ? page_task(x, s) : column_task(x, s);
      }
      for (long x; (x = biases.take()) < bias_.tasks();) bias_.task(x, s);
    });
    bias_.finish();
    return BSA_OK;
  }

 private:
  friend class BiasGradient<V>;
  static constexpr long L = 2 * V::W;
  // Tiles that share one product into dK and dV; narrow vectors leave more of the first cache to their sums than that saves.
  static constexpr int kJoint = V::W >= 16 ? 2 : 1;
  static constexpr long kStretchBytes = 8 << 20;  // of sums and operands: what a thread may hope to keep in a shared cache
  static constexpr long kRowUnits = kJoint * L / V::PAIR;  // operands of a row of p_rows and ds_rows

  // One tile of queries and everything that its products read.
  struct Tile : Queries<V> {
    float *query_panel, *dout_panel;  // [operand][lane]
    float *query_rows, *dout_rows;    // [query, or pair of queries][element]
    float *lse, *delta;               // [lane]
    float* dq;                        // [element][lane]
    bool first;
  };

  // What a thread owns.
  struct Space {
    Tile tiles[kTiles];
    float *dk, *dv;    // [key][element]
    float* kept;       // by heads, between stretches: dq of the tiles of a head, as [element][count]
    uint8_t* touched;  // by heads: whether these hold a sum for a key block, or anything
    float *scores, *dscores, *p_rows, *ds_rows, *ds_pairs, *peak, *scratch;
    Space(const Backward& k, float* m, long sums, long dq_floats) {
      auto cut = [&m](long n) { return m += n, m - n; };
      for (Tile& t : tiles) {
        t.query_panel = cut(k.d_units_ * L);
        t.dout_panel = cut(k.v_units_ * L);
        t.dq = cut(k.d_pad_ * L);
        t.lse = cut(L);
        t.delta = cut(L);
      }
      for (Tile& t : tiles) t.query_rows = cut(L / V::PAIR * k.d_pad_);  // of all tiles in a row, as joint products read them
      for (Tile& t : tiles) t.dout_rows = cut(L / V::PAIR * k.v_pad_);
      scores = cut(kKeys * L);
      dscores = cut(kKeys * L);
      p_rows = cut(kKeys * kRowUnits);
      ds_rows = cut(kKeys * kRowUnits);
      ds_pairs = V::PAIR == 2 ? cut(kKeys * L / 2) : nullptr;
      peak = cut(L);
      scratch = cut(V::W * (k.d_pad_ > k.v_pad_ ? k.d_pad_ : k.v_pad_));
      dk = cut(sums * k.d_pad_);
      dv = cut(sums * k.v_pad_);
      kept = cut(dq_floats);
      touched = reinterpret_cast<uint8_t*>(m);
    }
  };

  long tile_floats() const {
    return (d_units_ + v_units_ + d_pad_ + 2) * L + L / V::PAIR * (d_pad_ + v_pad_);
  }
  long scratch_floats() const {
    return kKeys * (L + kRowUnits) * 2 + (V::PAIR == 2 ? kKeys * L / 2 : 0) + L + V::W * (d_pad_ > v_pad_ ? d_pad_ : v_pad_);
  }
  // Whether keys are packed a second time, with pairs of rows interleaved.
  bool separate() const { return V::PAIR == 2; }
  const Operand<V>& key_columns() const { return separate() ? keys_paired_ : keys_; }

  long largest_block() const {
    long n = 0;
    for (long j = 0; j < c_.kv_blocks; ++j) n = layout_.kv_size(j) > n ? layout_.kv_size(j) : n;
    return n;
  }

  // Five products with the heads dealt to threads, or seven (and panels loaded per block) perfectly balanced?
  bool heads_are_faster() const {
    const long heads = c_.batch * c_.kv_heads, threads = c_.num_threads;
    if (threads == 1) return true;
    const long rounds = (heads + threads - 1) / threads;
    return double(rounds) <= 1.6 * double(heads) / double(threads);
  }

  // Tokens of a stretch of keys, at least the largest block; all keys where rows do not list them in order.
  long stretch_tokens(long largest) const {
    long n = c_.stretch;
    if (!n) {
      const long key = (d_pad_ + v_pad_) * 4 + (d_units_ + v_units_ + (separate() ? d_units_ : 0)) * 4;
      const long parts = (c_.kv_len * key + kStretchBytes - 1) / kStretchBytes;
      n = parts > 1 ? (c_.kv_len + parts - 1) / parts : c_.kv_len;
    }
    if (n >= c_.kv_len || !layout_.ascending()) return c_.kv_len;
    return n > largest ? n : largest;
  }

  void load_tile(Tile& t, long b, long h, long block, long first, long count, float* scratch) const {
    t.set(c_, b, h, block, first, count);
    const long lanes = t.lanes(), size = element_size(c_.dtype);
    const char* q = at(c_.q, c_.dtype, b, first, h);
    const char* g = at(c_.dout, c_.dtype, b, first, h);
    load_rows_paired<V>(q, c_.q.token * size, c_.dtype, count, c_.dim, t.query_rows, d_pad_);
    load_rows_paired<V>(g, c_.dout.token * size, c_.dtype, count, c_.v_dim, t.dout_rows, v_pad_);
    if constexpr (V::TILES) {  // a tile takes all pairs of queries
      const long pairs = (count + 1) / 2, missing = L / 2 - pairs;
      std::memset(t.query_rows + pairs * d_pad_, 0, size_t(missing * d_pad_) * 4);
      std::memset(t.dout_rows + pairs * v_pad_, 0, size_t(missing * v_pad_) * 4);
    }
    if constexpr (V::PAIR == 1) {
      transpose_rows<V>(t.query_rows, d_pad_, count, t.query_panel, lanes);
      transpose_rows<V>(t.dout_rows, v_pad_, count, t.dout_panel, lanes);
    } else {
      load_panel<V>(q, c_.q.token * size, c_.dtype, count, c_.dim, t.query_panel, lanes, scratch);
      load_panel<V>(g, c_.dout.token * size, c_.dtype, count, c_.v_dim, t.dout_panel, lanes, scratch);
    }
    const long x = (b * c_.q_heads + h) * c_.q_len + first;
    for (long l = 0; l < lanes; ++l) {
      const bool live = l < count && c_.lse[x + l] != -kInf;
      t.lse[l] = live ? c_.lse[x + l] : kInf;  // e^(s - inf) = 0
      t.delta[l] = live ? c_.delta[x + l] : 0.f;
    }
    t.first = true;
  }

  void store_queries(Tile& t, float* scratch) const {
    if (t.first) std::memset(t.dq, 0, size_t(d_pad_ * t.lanes()) * 4);
    float factor[L];
    for (float& f : factor) f = c_.scale;
    bsa_tensor dq = c_.dq;
    store_panel<V>(t.dq, t.lanes(), factor, t.count, c_.dim, at(dq, c_.result_dtype, t.b, t.token, t.h),
                   dq.token * element_size(c_.result_dtype), c_.result_dtype, scratch);
  }

  // Writes the finished sums of `count` keys from `token` of batch element (or page) b.
  void store_keys(long b, long kv_head, long token, long count, const float* dk, const float* dv) const {
    bsa_tensor to_k = c_.dk, to_v = c_.dv;
    for (long n = 0; n < count; ++n) {
      store_row<V>(dk + n * d_pad_, c_.scale, c_.result_dtype, c_.dim, at(to_k, c_.result_dtype, b, token + n, kv_head));
      store_row<V>(dv + n * v_pad_, drop_.on ? drop_.scale : 1.f, c_.result_dtype, c_.v_dim,
                   at(to_v, c_.result_dtype, b, token + n, kv_head));
    }
  }

  void clear(Space& s, long from, long to) const {
    std::memset(s.dk + from * d_pad_, 0, size_t((to - from) * d_pad_) * 4);
    std::memset(s.dv + from * v_pad_, 0, size_t((to - from) * v_pad_) * 4);
  }
  // Clears the sums of key block j right before their first use, which then finds them in the cache.
  BSA_INLINE void touch(long j, long token0, Space& s) const {
    if (s.touched[j]) return;
    s.touched[j] = 1;
    clear(s, c_.kv_bounds[j] - token0, c_.kv_bounds[j + 1] - token0);
  }

  // dQ of a tile, put aside in `kept` until the next stretch and taken up again.
  void keep(Tile& t, float* kept) const {
    if (t.first) std::memset(t.dq, 0, size_t(d_pad_ * t.lanes()) * 4);
    for (long x = 0; x < d_pad_; ++x) std::memcpy(kept + x * t.count, t.dq + x * t.lanes(), size_t(t.count) * 4);
  }
  void resume(Tile& t, const float* kept) const {
    for (long x = 0; x < d_pad_; ++x) {
      std::memcpy(t.dq + x * t.lanes(), kept + x * t.count, size_t(t.count) * 4);
      std::memset(t.dq + x * t.lanes() + t.count, 0, size_t(t.lanes() - t.count) * 4);
    }
    t.first = false;
  }

  // Walks slots `begin` to `end` of one row; `dk`, `dv` are indexed by token from `token0` on, `kept` by token of the head.
  template <Wants wants>
  void row(long b, long h, long i, Space& s, long begin, long end, long token0 = 0, float* kept = nullptr) const {
    const long r = layout_.row(b, h, i), kv_head = h / layout_.group();
    const bool resumes = begin > c_.row_begin[r], goes_on = end < c_.row_end[r];
    for (long q0 = c_.q_bounds[i]; q0 < c_.q_bounds[i + 1];) {
      int used = 0;
      for (; used < kTiles && q0 < c_.q_bounds[i + 1]; q0 += L) {
        const long left = c_.q_bounds[i + 1] - q0;
        load_tile(s.tiles[used], b, h, i, q0, left < L ? left : L, s.scratch);
        if (resumes) resume(s.tiles[used], kept + q0 * d_pad_);
        ++used;
      }
      for (long x = begin; x < end; ++x) {
        if constexpr (wants == Wants::All) touch(c_.indices[x], token0, s);
        each_piece(c_, x, [&](const Keys& keys) {
          const long token = c_.kv_bounds[keys.block] - token0;
          for (int t = 0; t < used; t += kJoint)
            visit<wants>(s.tiles + t, used - t, kv_head, keys, s, s.dk + token * d_pad_, s.dv + token * v_pad_);
        });
      }
      for (int t = 0; t < used; ++t)
        goes_on ? keep(s.tiles[t], kept + s.tiles[t].token * d_pad_) : store_queries(s.tiles[t], s.scratch);
    }
  }

  // All rows over one stretch of keys, then the next, so that the sums of a stretch and its operands stay in the cache.
  void head_task(long b, long kv_head, long stretch, Space& s) const {
    std::memset(s.touched, 0, size_t(c_.kv_blocks));
    const long g = layout_.group();
    long j0 = 0, j1 = 0;
    do {
      const long token0 = c_.kv_bounds[j0];
      while (j1 < c_.kv_blocks && c_.kv_bounds[j1 + 1] - token0 <= stretch) ++j1;
      const auto first_at = [&](long r, long j) {
        return std::lower_bound(c_.indices + c_.row_begin[r], c_.indices + c_.row_end[r], j) - c_.indices;
      };
      for (long h = kv_head * g; h < kv_head * g + g; ++h)
        for (long i = 0; i < c_.q_blocks; ++i) {
          const long r = layout_.row(b, h, i);
          const long begin = j0 ? first_at(r, j0) : c_.row_begin[r], end = j1 < c_.kv_blocks ? first_at(r, j1) : c_.row_end[r];
          const bool empty = c_.row_begin[r] == c_.row_end[r];
          if (empty ? !j0 : begin < end)
            row<Wants::All>(b, h, i, s, begin, end, token0, s.kept + (h - kv_head * g) * c_.q_len * d_pad_);
        }
      for (long j = j0; j < j1; ++j) {
        if (c_.page_table && !layout_.referenced(b, kv_head, j)) continue;
        touch(j, token0, s);
        const long page = c_.page_table ? c_.page_table[b * c_.kv_blocks + j] : b, token = c_.page_table ? 0 : c_.kv_bounds[j];
        const long at = c_.kv_bounds[j] - token0;
        store_keys(page, kv_head, token, layout_.kv_size(j), s.dk + at * d_pad_, s.dv + at * v_pad_);
      }
      j0 = j1;
    } while (j0 < c_.kv_blocks);
  }

  // Task x of the pass over rows: heads in order, longest rows first where one layout serves all heads.
  void row_task(long x, Space& s) const {
    const long i = x % c_.q_blocks, h = x / c_.q_blocks % c_.q_heads, b = x / c_.q_blocks / c_.q_heads;
    const long own = layout_.shared() ? c_.row_order[i] : i, r = layout_.row(b, h, own);
    row<Wants::Queries>(b, h, own, s, c_.row_begin[r], c_.row_end[r]);
  }

  void column_task(long x, Space& s) const {
    const long rank = x % c_.kv_blocks, kv_head = x / c_.kv_blocks % c_.kv_heads, b = x / c_.kv_blocks / c_.kv_heads;
    const long j = layout_.shared() ? c_.col_order[rank] : rank;
    clear(s, 0, layout_.kv_size(j));
    column(b, kv_head, j, s);
    store_keys(b, kv_head, c_.kv_bounds[j], layout_.kv_size(j), s.dk, s.dv);
  }

  // All readers of one page, which may be blocks of different length.
  void page_task(long x, Space& s) const {
    const long kv_head = x / readers_.count, page = readers_.used[x % readers_.count];
    long size = 0;
    for (long r = readers_.begin[page]; r < readers_.begin[page + 1]; ++r) {
      const long b = readers_.items[r] / c_.kv_blocks, j = readers_.items[r] % c_.kv_blocks, own = layout_.kv_size(j);
      if (own > size) {
        clear(s, size, own);
        size = own;
      }
      column(b, kv_head, j, s);
    }
    store_keys(page, kv_head, 0, size, s.dk, s.dv);
  }

  // Adds what key block j receives to s.dk and s.dv.
  void column(long b, long kv_head, long j, Space& s) const {
    const long g = layout_.group();
    for (long h = kv_head * g; h < kv_head * g + g; ++h) {
      const long column = layout_.column(b, h, j);
      for (long y = c_.col_begin[column]; y < c_.col_end[column]; ++y) {
        const long i = c_.t_rows[y];
        for (long q0 = c_.q_bounds[i]; q0 < c_.q_bounds[i + 1];) {
          int used = 0;
          for (; used < kJoint && q0 < c_.q_bounds[i + 1]; q0 += L) {
            const long left = c_.q_bounds[i + 1] - q0;
            load_tile(s.tiles[used++], b, h, i, q0, left < L ? left : L, s.scratch);
          }
          each_piece(c_, c_.t_slots[y], [&](const Keys& keys) { visit<Wants::Keys>(s.tiles, used, kv_head, keys, s, s.dk, s.dv); });
        }
      }
    }
  }

  // Scores of a tile, masked, and dO V^T beside them; false when nothing is left. Cuts `keys` to what it computed.
  template <int MV>
  BSA_INLINE bool score(const Tile& t, long kv_head, Keys& keys, TileMask& mask, Space& s) const {
    constexpr long lanes = MV * V::W;
    if (!clip<V>(c_, info_, t, keys, mask)) return false;
    const long rows = keys.count;
    product<V, MV, Walk::Rows, Into::Score>(rows, units<V>(c_.dim), keys_.block(t.b, kv_head, keys.block, keys.offset),
                                            keys_.row_bytes(), t.query_panel, lanes, s.scores, lanes, c_.scale,
                                            bias_of(c_, t.b, t.h, keys.slot), s.peak);
    if (mask.any()) mask_scores<V, MV>(s.scores, rows, mask, s.peak);
    product<V, MV, Walk::Rows, Into::Set>(rows, units<V>(c_.v_dim), values_.block(t.b, kv_head, keys.block, keys.offset),
                                          values_.row_bytes(), t.dout_panel, lanes, s.dscores, lanes);
    return true;
  }

  // Up to kJoint neighbouring tiles and a piece of a key block. Where all take the same keys, dK and dV are read and written once;
  // sums run over the queries in order either way.
  template <Wants wants>
  void visit(Tile* tiles, int count, long kv_head, const Keys& keys, Space& s, float* dk, float* dv) const {
    if (count > kJoint) count = kJoint;
    Keys cut[kJoint];
    bool live[kJoint];
    for (int x = 0; x < count; ++x) {
      cut[x] = keys;
      live[x] = tiles[x].vectors == 2 ? gradients<2, wants>(tiles[x], x, kv_head, cut[x], s)
                                      : gradients<1, wants>(tiles[x], x, kv_head, cut[x], s);
    }
    if (wants == Wants::Queries) return;
    for (int x = 0; x < count; ++x) {
      if (!live[x]) continue;
      int last = x;
      while (last + 1 < count && live[last + 1] && cut[last + 1].offset == cut[x].offset && cut[last + 1].count == cut[x].count) ++last;
      const long depth = (last - x) * (L / V::PAIR) + units<V>(tiles[last].count), from = x * (L / V::PAIR);
      product_lanes<V, Walk::Rows, Into::Add>(int(v_pad_ / V::W), cut[x].count, depth, s.p_rows + from, kRowUnits * 4,
                                              tiles[x].dout_rows, v_pad_, dv + cut[x].offset * v_pad_, v_pad_);
      product_lanes<V, Walk::Rows, Into::Add>(int(d_pad_ / V::W), cut[x].count, depth, s.ds_rows + from, kRowUnits * 4,
                                              tiles[x].query_rows, d_pad_, dk + cut[x].offset * d_pad_, d_pad_);
      x = last;
    }
  }

  // P and dS of a tile, the `at`-th of its visit, as rows of keys, and dQ; false when nothing is left. Cuts `keys`.
  template <int MV, Wants wants>
  bool gradients(Tile& t, int at, long kv_head, Keys& keys, Space& s) const {
    constexpr long lanes = MV * V::W;
    TileMask mask;
    if (!score<MV>(t, kv_head, keys, mask, s)) return false;
    const long rows = keys.count, even = round_up(rows, kKeyStep<V>);
    for (long x = rows * lanes; x < even * lanes; ++x) s.scores[x] = -kInf, s.dscores[x] = 0.f;
    const bool sums = wants != Wants::Keys && c_.dblock_bias;
    float sum;
    if (drop_.on) {
      uint32_t keep[kKeys * MV];
      drop_.keep<V, MV>(t.b, t.h, mask.query0, mask.key0, even, keep);
      sum = sums ? score_gradients<MV, true, true>(t, at, even, s, keep) : score_gradients<MV, false, true>(t, at, even, s, keep);
    } else {
      sum = sums ? score_gradients<MV, true, false>(t, at, even, s, nullptr) : score_gradients<MV, false, false>(t, at, even, s, nullptr);
    }
    if (sums) c_.dblock_bias[(t.b * c_.q_heads + t.h) * c_.bias_entries + c_.entries[keys.slot]] += sum;

    if constexpr (wants != Wants::Keys) {
      const char* k = key_columns().block(t.b, kv_head, keys.block, keys.offset);
      const long stride = key_columns().row_bytes(), ldb = V::PAIR == 2 ? lanes : kRowUnits;
      const float* by_key = V::PAIR == 2 ? s.ds_pairs : s.ds_rows + at * L;
      if (t.first)
        product<V, MV, Walk::Columns, Into::Set>(c_.dim, even / V::PAIR, k, stride, by_key, ldb, t.dq, lanes);
      else
        product<V, MV, Walk::Columns, Into::Add>(c_.dim, even / V::PAIR, k, stride, by_key, ldb, t.dq, lanes);
      t.first = false;
    }
    return true;
  }

  // scores -> P, dscores -> dS as rows of keys, in the `at`-th place; for PAIR 2 in bf16, and dS also as interleaved pairs of keys.
  // Returns the sum of dS. With `drops`, P becomes what dropout keeps of it, not yet divided by 1 - p.
  template <int MV, bool sums, bool drops>
  __attribute__((noinline)) float score_gradients(const Tile& t, int at, long rows, Space& s, const uint32_t* keep) const {
    constexpr long lanes = MV * V::W;
    const typename V::f factor = V::all(drop_.scale);
    typename V::f total = V::all(0.f);
    float *p_rows = s.p_rows + at * (L / V::PAIR), *ds_rows = s.ds_rows + at * (L / V::PAIR);
    if constexpr (V::TILES && MV == 1)  // a matrix tile takes whole rows
      for (long n = 0; n < rows; ++n) {
        std::memset(p_rows + n * kRowUnits, 0, L * 2);
        std::memset(ds_rows + n * kRowUnits, 0, L * 2);
      }
    for (int j = 0; j < MV; ++j) {
      const typename V::f lse = V::load(t.lse + j * V::W), delta = V::load(t.delta + j * V::W);
      auto pair = [&](long n, typename V::f& p, typename V::f& d) {
        const long x = n * lanes + j * V::W;
        p = exp<V>(V::sub(V::load(s.scores + x), lse));
        d = V::load(s.dscores + x);
        if (drops) d = V::keep_bits(V::mul(d, factor), keep[n * MV + j]);
        d = V::mul(p, V::sub(d, delta));
        if (drops) p = V::keep_bits(p, keep[n * MV + j]);
      };
      if constexpr (V::PAIR == 1) {
        for (long n = 0; n < rows; ++n) {
          typename V::f p, d;
          pair(n, p, d);
          V::store(p_rows + n * kRowUnits + j * V::W, p);
          V::store(ds_rows + n * kRowUnits + j * V::W, d);
          if (sums) total = V::add(total, d);
        }
      } else {
        for (long n = 0; n < rows; n += 2) {
          typename V::f p0, p1, d0, d1;
          pair(n, p0, d0);
          pair(n + 1, p1, d1);
          const long to = n * kRowUnits + j * V::W / 2, next = to + kRowUnits;
          V::store_bf16(p_rows + to, p0);
          V::store_bf16(p_rows + next, p1);
          V::store_bf16(ds_rows + to, d0);
          V::store_bf16(ds_rows + next, d1);
          V::store(s.ds_pairs + n / 2 * lanes + j * V::W, V::pair(d0, d1));
          if (sums) total = V::add(total, V::add(d0, d1));
        }
      }
    }
    float lane[V::W], sum = 0.f;
    V::store(lane, total);
    for (float x : lane) sum += x;
    return sum;
  }

  const bsa_call& c_;
  Layout layout_;
  Dropout drop_;
  Operand<V> keys_, keys_paired_, values_;
  KeyBlocks info_;
  PageReaders readers_;
  BiasGradient<V> bias_;
  // Padded to whole vectors: elements of a row in f32, and operands of a row.
  const long d_pad_ = round_up(c_.dim, V::W), v_pad_ = round_up(c_.v_dim, V::W);
  const long d_units_ = round_up(units<V>(c_.dim), V::W), v_units_ = round_up(units<V>(c_.v_dim), V::W);
};

}  // namespace
