// The C interface of the native core: one struct in, one status out. Plain pointers and sizes, no torch ABI.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Bumped with every change of this file; the loader refuses a core that was built from another version.
#define BSA_ABI_VERSION 12

enum { BSA_F32 = 0, BSA_BF16 = 1, BSA_F16 = 2 };
enum { BSA_OK = 0, BSA_BAD_ARGUMENT = 1, BSA_NO_ISA = 2 };
enum {
  BSA_ISA_PORTABLE = 0,
  BSA_ISA_AVX2 = 1,
  BSA_ISA_AVX512 = 2,
  BSA_ISA_AVX512_BF16 = 3,
  BSA_ISA_AMX_BF16 = 4,
  BSA_ISA_AMX_BF16_EMULATED = 5,  // for tests: the AMX engine on any machine, slow; chosen only by name
  BSA_ISA_COUNT = 6
};
// How backward splits its work. Every choice gives the same bits.
enum { BSA_SPLIT_AUTO = 0, BSA_SPLIT_HEADS = 1, BSA_SPLIT_BLOCKS = 2 };

// A [batch, token, head, dim] tensor; strides in elements, unit stride along dim.
typedef struct {
  void* data;
  int64_t batch, token, head;
} bsa_tensor;

typedef struct {
  int32_t abi_version, isa, num_threads, split;
  int32_t dtype;         // of q, k, v and dout
  int32_t result_dtype;  // of what is written: out, dq, dk, dv
  int64_t batch, q_heads, kv_heads, q_len, kv_len, dim, v_dim;
  float scale;
  int32_t stretch;       // keys that backward by heads sums at a time, or one block if that is more; 0: the core chooses. Never changes bits

  // The plan: see bs_kernels.LayoutPlan, whose names these are. `layouts` and `layout_heads` are 1 when shared.
  int64_t layouts, layout_heads, q_blocks, kv_blocks;
  const int32_t *row_begin, *row_end, *indices, *entries, *col_begin, *col_end, *t_rows, *t_slots, *row_order, *col_order;
  const int32_t *q_bounds, *kv_bounds, *q_start, *kv_start;
  int64_t band_lo, band_hi;  // a pair is kept iff band_lo <= key position - query position <= band_hi

  // What belongs to one call; null when absent.
  const uint8_t* key_padding;    // [batch, kv_len], nonzero = a real token
  const int32_t *q_segments;     // [batch, q_len]
  const int32_t *kv_segments;    // [batch, kv_len]
  const float* sinks;            // [q_heads]
  const int32_t* page_table;     // [batch, kv_blocks]; then k, v, dk and dv have pages for batch elements, dk and dv zeroed by the caller
  int64_t pages;
  const float* block_bias;       // added to the scores of slot s: block_bias[b * bias_batch + h * bias_head + entries[s]]
  float* dblock_bias;            // [batch, q_heads, bias_entries], zeroed by the caller; null when not wanted
  int64_t bias_batch, bias_head, bias_entries;
  const void* attn_bias;         // f32 added to the scores, or bytes (nonzero = attend) with attn_bias_bool
  int64_t attn_bias_bool, attn_bias_batch, attn_bias_head, attn_bias_query, attn_bias_key;  // strides in elements, 0 broadcasts
  // [batch or 1, q_heads or 1, q_len or 1, kv_len or 1] in f32, zeroed by the caller; null when not wanted. A stride of 0 sums.
  float* dattn_bias;
  int64_t dattn_bias_batch, dattn_bias_head, dattn_bias_query, dattn_bias_key;
  const int64_t* dropout_seed;   // null without dropout: see dropout.h
  uint32_t dropout_threshold;    // a probability is kept iff its word is at least this
  float dropout_scale;           // of the kept ones
  int64_t first_batch, first_head;  // what dropout counts batch elements and query heads from

  bsa_tensor q, k, v, out, dout, dq, dk, dv;
  float* lse;                    // [batch, q_heads, q_len]; written by forward, read by backward and delta
  const float* dlse;             // [batch, q_heads, q_len], or null for zeros; read by delta
  float* delta;                  // [batch, q_heads, q_len]: rowsum(dout * out) - dlse; written by delta, read by backward

  void* workspace;               // aligned to 64 bytes; the core allocates nothing itself
  int64_t workspace_bytes;
} bsa_call;

// Rows of scores and what was picked from them: row-major arrays.
typedef struct {
  int32_t abi_version, isa, num_threads, reserved;
  int64_t rows, columns, slots;
  const float* scores;    // [rows, columns]
  const int64_t* counts;  // [rows]; how many to take, at most `slots` and `columns`
  int64_t* picked;        // [rows, slots]; columns of the largest scores, ascending, the last column in the rest
  int32_t* scratch;       // [num_threads, columns]
} bsa_best;

// Key blocks picked for every query block, and the lists of a plan that come of them: see bs_kernels.LayoutPlan.
typedef struct {
  int32_t abi_version, num_threads;
  int64_t heads;                            // of all layouts together
  int64_t q_blocks, kv_blocks, slots;
  const int64_t *picked, *counts;           // [heads, q_blocks, slots], [heads, q_blocks]
  const int32_t *q_bounds, *kv_bounds, *q_start, *kv_start;
  int64_t band_lo, band_hi;
  int32_t *row_begin, *row_end;             // [heads, q_blocks]
  int32_t *indices, *entries, *t_rows, *t_slots;  // [heads * q_blocks * slots], fewer than 2^31
  int32_t *col_begin, *col_end;             // [heads, kv_blocks]
  int32_t *row_order, *col_order;
  uint8_t* partial;                         // as indices
  int32_t* scratch;                         // [max(heads, slots + 1, q_blocks + 1)]
  int32_t* unclear;                         // set to 1 where a count or block is out of range or a row does not rise, else to 0
} bsa_lists;

// The most lanes of any engine. Of a perceptron: the most layers, and rows taken at a time; all widths but the first are multiples of
// the lanes. Of scores: query and key blocks taken at a time.
enum { BSA_LANES = 16, BSA_MAX_LAYERS = 8, BSA_PERCEPTRON_ROWS = 48, BSA_SCORE_ROWS = 48, BSA_SCORE_LANES = 128 };

// Perceptrons: rows are normalised, then linear layers with GELU between them. Contiguous f32 arrays.
typedef struct {
  int32_t abi_version, isa, num_threads, layers;
  int64_t batch, heads, rows, widest;       // widest: the largest width
  int64_t widths[BSA_MAX_LAYERS + 1];       // of the input and of what each layer gives
  const float* x;                           // [batch, heads, rows, widths[0]]
  const float* weights[BSA_MAX_LAYERS];     // [heads, widths[i], widths[i + 1]]
  const float* biases[BSA_MAX_LAYERS];      // [heads, widths[i + 1]]
  float* out;                               // [batch, heads, rows, widths[layers]]
  float* scratch;                           // [num_threads, 2, BSA_PERCEPTRON_ROWS, widest]
  float epsilon;                            // added to the variance
  int32_t reserved;
} bsa_perceptron;

// What bs_kernels.block_scores takes, contiguous f32 arrays.
typedef struct {
  int32_t abi_version, isa, num_threads;
  int32_t means, extremes;                  // 1: the term of the means, that of the extremes, is part of the score
  float scale;
  int64_t batch, q_heads, kv_heads, q_blocks, kv_blocks, dim, q_parts, kv_parts, rank;
  const float *queries, *keys;              // [batch, heads, blocks, parts, dim]
  const float *f, *g;                       // [batch, heads, blocks, rank]
  const float *gain, *slope;                // [q_heads, 2], [q_heads]
  const float* distance;                    // [q_blocks, kv_blocks]
  float* scores;                            // [batch, q_heads, q_blocks, kv_blocks]
  // Widths and blocks in whole numbers of BSA_LANES: [batch, kv_heads, width, kv_blocks], width that of the parts that are read and of
  // the rank; then [num_threads, BSA_SCORE_ROWS, width + BSA_SCORE_LANES].
  float* workspace;
  int64_t workspace_floats;
} bsa_scores;

#define BSA_EXPORT __attribute__((visibility("default")))

BSA_EXPORT int bsa_abi_version(void);
BSA_EXPORT const char* bsa_isa_name(int isa);
BSA_EXPORT int bsa_isa_supported(int isa);  // 1 when compiled in and this machine runs it
BSA_EXPORT const char* bsa_isa_refused(int isa);  // why it is not supported; null when it is
BSA_EXPORT int bsa_openmp(void);            // 1 when built with threads

// With `need`, nothing runs: the bytes of workspace that the call takes are written there.
BSA_EXPORT int bsa_forward(const bsa_call* call, int64_t* need);
BSA_EXPORT int bsa_backward(const bsa_call* call, int64_t* need);
// Reads batch, q_heads, q_len, v_dim, dout in dtype and out in result_dtype; takes no workspace.
BSA_EXPORT int bsa_delta(const bsa_call* call);
// Reads batch, kv_heads, kv_len, dim, kv_blocks, kv_bounds and k in dtype. Writes the mean of every key block to out
// [batch, kv_blocks, kv_heads, v_dim] in f32, v_dim = dim; then the maximum with 2 dim, then the minimum with 3 dim.
BSA_EXPORT int bsa_pool(const bsa_call* call);
BSA_EXPORT int bsa_best_blocks(const bsa_best* call);
BSA_EXPORT int bsa_batched_lists(const bsa_lists* call);
BSA_EXPORT int bsa_head_perceptron(const bsa_perceptron* call);
BSA_EXPORT int bsa_block_scores(const bsa_scores* call);

#ifdef __cplusplus
}
#endif
