// The exported functions: which engine runs a call.
#include "amx_support.h"
#include "call.h"
#include "engine.h"
#include "huge_pages.h"
#include "lists.h"
#include "self_test.h"

// The build defines BSA_WITH_<NAME> for every instruction set that it compiled.
namespace {

const bsa_engine* engine(int isa) {
  switch (isa) {
    case BSA_ISA_PORTABLE:
      return &bsa_engine_portable;
#if defined(BSA_WITH_AVX2)
    case BSA_ISA_AVX2:
      return &bsa_engine_avx2;
#endif
#if defined(BSA_WITH_AVX512)
    case BSA_ISA_AVX512:
      return &bsa_engine_avx512;
#endif
#if defined(BSA_WITH_AVX512_BF16)
    case BSA_ISA_AVX512_BF16:
      return &bsa_engine_avx512_bf16;
#endif
#if defined(BSA_WITH_AMX_BF16)
    case BSA_ISA_AMX_BF16:
      return &bsa_engine_amx_bf16;
#endif
#if defined(BSA_WITH_AMX_BF16_EMULATED)
    case BSA_ISA_AMX_BF16_EMULATED:
      return &bsa_engine_amx_bf16_emulated;
#endif
    default:
      return nullptr;
  }
}

bool machine_runs(int isa) {
  if (isa == BSA_ISA_PORTABLE || isa == BSA_ISA_AMX_BF16_EMULATED) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == BSA_ISA_AVX2) return avx2;
  if (isa == BSA_ISA_AVX512) return avx512;
#if defined(BSA_WITH_AVX512_BF16) || defined(BSA_WITH_AMX_BF16)
  return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#endif
  return false;
}

// Null, or why tiles are not to be used. The real ones are asked for only where the processor and the kernel grant them, and both
// kinds run calls only after the self-test.
const char* tiles_fail(int isa) {
  if (isa == BSA_ISA_AMX_BF16) {
    const char* reason = tiles_refused();
#if defined(BSA_TRAPPED_TILES)  // the tests' driver carries the instructions out itself: csrc/tests/trapped_tiles.h
    reason = nullptr;
#endif
    if (reason) return reason;
  }
  return SelfTest().agrees(*engine(isa), bsa_engine_portable) ? nullptr : "it failed its self-test: its results differ from the portable engine's";
}

const char* refused(int isa) {
  if (isa < 0 || isa >= BSA_ISA_COUNT) return "there is no such instruction set";
  if (!engine(isa)) return "the build left it out";
  if (!machine_runs(isa)) return "this processor does not have it";
  // Once per process, at the first question.
  if (isa == BSA_ISA_AMX_BF16) {
    static const char* const reason = tiles_fail(BSA_ISA_AMX_BF16);
    return reason;
  }
  if (isa == BSA_ISA_AMX_BF16_EMULATED) {
    static const char* const reason = tiles_fail(BSA_ISA_AMX_BF16_EMULATED);
    return reason;
  }
  return nullptr;
}

// Pairs and tiles are for bf16 alone.
int wide(int isa) {
  if (isa == BSA_ISA_AVX512_BF16 || isa == BSA_ISA_AMX_BF16) return BSA_ISA_AVX512;
  return isa == BSA_ISA_AMX_BF16_EMULATED ? BSA_ISA_PORTABLE : isa;
}

int resolve(const bsa_call* c, const bsa_engine** out) {
  if (!c || c->abi_version != BSA_ABI_VERSION || c->num_threads < 1) return BSA_BAD_ARGUMENT;
  if (c->dtype < BSA_F32 || c->dtype > BSA_F16 || c->result_dtype < BSA_F32 || c->result_dtype > BSA_F16) return BSA_BAD_ARGUMENT;
  if (c->kv_heads < 1 || c->q_heads % c->kv_heads || c->dim < 1 || c->v_dim < 1) return BSA_BAD_ARGUMENT;
  if ((c->layouts != 1 && c->layouts != c->batch) || (c->layout_heads != 1 && c->layout_heads != c->q_heads)) return BSA_BAD_ARGUMENT;
  if (!c->q_segments != !c->kv_segments) return BSA_BAD_ARGUMENT;
  if (refused(c->isa)) return BSA_NO_ISA;
  *out = engine(c->dtype == BSA_BF16 ? c->isa : wide(c->isa));
  return *out ? BSA_OK : BSA_NO_ISA;
}

}  // namespace

extern "C" {

int bsa_abi_version(void) { return BSA_ABI_VERSION; }

const char* bsa_isa_name(int isa) {
  static const char* const names[BSA_ISA_COUNT] = {"portable",    "avx2",     "avx512",
                                                    "avx512_bf16", "amx_bf16", "amx_bf16_emulated"};
  return isa >= 0 && isa < BSA_ISA_COUNT ? names[isa] : nullptr;
}

int bsa_isa_supported(int isa) { return refused(isa) == nullptr; }

const char* bsa_isa_refused(int isa) { return refused(isa); }

int bsa_openmp(void) {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

int bsa_forward(const bsa_call* call, int64_t* need) {
  const bsa_engine* e = nullptr;
  const int status = resolve(call, &e);
  if (status || need) return status ? status : e->forward(call, need);
  const bsa_call& c = *call;
  prefer_huge_pages(c.workspace, c.workspace_bytes);
  prefer_huge_pages(c.out, c.result_dtype, c.batch, c.q_len, c.q_heads, c.v_dim);
  return e->forward(call, nullptr);
}

int bsa_backward(const bsa_call* call, int64_t* need) {
  const bsa_engine* e = nullptr;
  const int status = resolve(call, &e);
  if (status || need) return status ? status : e->backward(call, need);
  const bsa_call& c = *call;
  prefer_huge_pages(c.workspace, c.workspace_bytes);
  prefer_huge_pages(c.dq, c.result_dtype, c.batch, c.q_len, c.q_heads, c.dim);
  if (!c.page_table) {
    prefer_huge_pages(c.dk, c.result_dtype, c.batch, c.kv_len, c.kv_heads, c.dim);
    prefer_huge_pages(c.dv, c.result_dtype, c.batch, c.kv_len, c.kv_heads, c.v_dim);
  }
  return e->backward(call, nullptr);
}

int bsa_delta(const bsa_call* call) {
  const bsa_engine* e = nullptr;
  const int status = resolve(call, &e);
  return status ? status : e->delta(call);
}

int bsa_pool(const bsa_call* call) {
  const bsa_engine* e = nullptr;
  const int status = resolve(call, &e);
  return status ? status : e->pool(call);
}

int bsa_best_blocks(const bsa_best* c) {
  if (!c || c->abi_version != BSA_ABI_VERSION || c->num_threads < 1 || c->columns < 1) return BSA_BAD_ARGUMENT;
  return refused(c->isa) ? BSA_NO_ISA : engine(c->isa)->best(c);
}

int bsa_batched_lists(const bsa_lists* c) {
  if (!c || c->abi_version != BSA_ABI_VERSION || c->num_threads < 1) return BSA_BAD_ARGUMENT;
  return Lists(*c).run();
}

int bsa_head_perceptron(const bsa_perceptron* c) {
  if (!c || c->abi_version != BSA_ABI_VERSION || c->num_threads < 1) return BSA_BAD_ARGUMENT;
  const bsa_engine* const e = refused(c->isa) ? nullptr : engine(wide(c->isa));
  return e ? e->perceptron(c) : BSA_NO_ISA;
}

int bsa_block_scores(const bsa_scores* c) {
  if (!c || c->abi_version != BSA_ABI_VERSION || c->num_threads < 1) return BSA_BAD_ARGUMENT;
  if (c->kv_heads < 1 || c->q_heads % c->kv_heads || c->dim < 1 || c->q_parts < 1) return BSA_BAD_ARGUMENT;
  const bsa_engine* const e = refused(c->isa) ? nullptr : engine(wide(c->isa));
  return e ? e->scores(c) : BSA_NO_ISA;
}
}
