#include "vec_avx512_bf16.h"
// The vector type comes first.
#include "backward.h"
#include "delta.h"
#include "engine.h"
#include "forward.h"
#include "perceptron.h"
#include "picks.h"
#include "pool.h"
#include "scores.h"

// Pairs are for bf16 inputs alone; the dispatcher sends other types to the AVX-512 engine.
BSA_DEFINE_ENGINE(bsa_engine_avx512_bf16, Avx512Bf16)
