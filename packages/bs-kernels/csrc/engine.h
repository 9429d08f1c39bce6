// What a translation unit per instruction set exports. Each includes the whole engine in an unnamed namespace, so that the
// linker can never merge code that was compiled for another machine.
#pragma once
#include "call.h"

struct bsa_engine {
  int (*forward)(const bsa_call*, int64_t* need);
  int (*backward)(const bsa_call*, int64_t* need);
  int (*delta)(const bsa_call*);
  int (*pool)(const bsa_call*);
  int (*best)(const bsa_best*);
  int (*perceptron)(const bsa_perceptron*);
  int (*scores)(const bsa_scores*);
};

extern const bsa_engine bsa_engine_portable, bsa_engine_avx2, bsa_engine_avx512, bsa_engine_avx512_bf16, bsa_engine_amx_bf16,
    bsa_engine_amx_bf16_emulated;

#define BSA_DEFINE_ENGINE(NAME, V)                                              \
  static int run_forward(const bsa_call* c, int64_t* need) { return Forward<V>(*c).run(need); }    \
  static int run_backward(const bsa_call* c, int64_t* need) { return Backward<V>(*c).run(need); }  \
  static int run_delta(const bsa_call* c) { return Delta<V>(*c).run(); }          \
  static int run_pool(const bsa_call* c) { return Pool<V>(*c).run(); }            \
  static int run_best(const bsa_best* c) { return Best<V>(*c).run(); }            \
  static int run_perceptron(const bsa_perceptron* c) { return run_perceptron_on<V>(*c); } \
  static int run_scores(const bsa_scores* c) { return run_scores_on<V>(*c); } \
  const bsa_engine NAME = {run_forward, run_backward, run_delta, run_pool, run_best, run_perceptron, run_scores};
