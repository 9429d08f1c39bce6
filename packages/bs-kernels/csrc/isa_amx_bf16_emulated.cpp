#include "vec_amx_bf16_emulated.h"
// The vector type comes first.
#include "backward.h"
#include "delta.h"
#include "engine.h"
#include "forward.h"
#include "perceptron.h"
#include "picks.h"
#include "pool.h"
#include "scores.h"

// The AMX engine on any machine; the dispatcher sends other types than bf16 to the portable engine.
BSA_DEFINE_ENGINE(bsa_engine_amx_bf16_emulated, AmxBf16Emulated)
