#include "vec_amx_bf16.h"
// The vector type comes first.
#include "backward.h"
#include "delta.h"
#include "engine.h"
#include "forward.h"
#include "perceptron.h"
#include "picks.h"
#include "pool.h"
#include "scores.h"

// Tiles are for bf16 inputs alone; the dispatcher sends other types to the AVX-512 engine.
BSA_DEFINE_ENGINE(bsa_engine_amx_bf16, AmxBf16)
