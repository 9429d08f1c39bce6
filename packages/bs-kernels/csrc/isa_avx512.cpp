#include "vec_avx512.h"
// The vector type comes first.
#include "backward.h"
#include "delta.h"
#include "engine.h"
#include "forward.h"
#include "perceptron.h"
#include "picks.h"
#include "pool.h"
#include "scores.h"

BSA_DEFINE_ENGINE(bsa_engine_avx512, Avx512)
