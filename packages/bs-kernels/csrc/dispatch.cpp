// The exported functions: which engine runs a call.
#include "call.h"
#include "engine.h"

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
    default:
      return nullptr;
  }
}

bool machine_runs(int isa) {
  if (isa == BSA_ISA_PORTABLE) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == BSA_ISA_AVX2) return avx2;
  if (isa == BSA_ISA_AVX512) return avx512;
#if defined(BSA_WITH_AVX512_BF16)
  if (isa == BSA_ISA_AVX512_BF16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#endif
  return false;
}

int resolve(const bsa_call* c, const bsa_engine** out) {
  if (!c || c->abi_version != BSA_ABI_VERSION || c->num_threads < 1) return BSA_BAD_ARGUMENT;
  if (c->dtype < BSA_F32 || c->dtype > BSA_F16 || c->result_dtype < BSA_F32 || c->result_dtype > BSA_F16) return BSA_BAD_ARGUMENT;
  if (c->kv_heads < 1 || c->q_heads % c->kv_heads || c->dim < 1 || c->v_dim < 1) return BSA_BAD_ARGUMENT;
  if ((c->layouts != 1 && c->layouts != c->batch) || (c->layout_heads != 1 && c->layout_heads != c->q_heads)) return BSA_BAD_ARGUMENT;
  if (!c->q_segments != !c->kv_segments) return BSA_BAD_ARGUMENT;
  if (!bsa_isa_supported(c->isa)) return BSA_NO_ISA;
  *out = engine(c->isa);
  // Pairs are for bf16 alone.
  if (c->isa == BSA_ISA_AVX512_BF16 && c->dtype != BSA_BF16) *out = engine(BSA_ISA_AVX512);
  return *out ? BSA_OK : BSA_NO_ISA;
}

}  // namespace

extern "C" {

int bsa_abi_version(void) { return BSA_ABI_VERSION; }

const char* bsa_isa_name(int isa) {
  static const char* const names[BSA_ISA_COUNT] = {"portable", "avx2", "avx512", "avx512_bf16"};
  return isa >= 0 && isa < BSA_ISA_COUNT ? names[isa] : nullptr;
}

int bsa_isa_supported(int isa) { return engine(isa) && machine_runs(isa); }

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
  return status ? status : e->forward(call, need);
}

int bsa_backward(const bsa_call* call, int64_t* need) {
  const bsa_engine* e = nullptr;
  const int status = resolve(call, &e);
  return status ? status : e->backward(call, need);
}
}
