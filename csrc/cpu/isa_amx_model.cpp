// The kernels on tiles with the model of the instructions, on any processor: slow, for tests (co_set_cpu_isa).
#include "cpu/chunk_kernels.h"
#include "cpu/tile_model.h"

#define CO_TILE_BEGIN() tile_model::begin()
#define CO_TILE_END() tile_model::end()
#define CO_TILE_ZERO(t) tile_model::zero(t)
#define CO_TILE_LOAD(t, from, pitch) tile_model::load(t, from, pitch)
#define CO_TILE_STORE(t, to, pitch) tile_model::store(t, to, pitch)
#define CO_TILE_MULTIPLY(c, a, b) tile_model::multiply(c, a, b)

namespace consistency_ops::cpu {
namespace amx_model {
#include "cpu/pair_pack.inl"
#include "cpu/tile_kernels.inl"
}  // namespace amx_model

extern const TileKernels amx_model_tiles;
extern const PairKernels amx_model_pairs;
const TileKernels amx_model_tiles = {amx_model::begin, amx_model::end, amx_model::split, amx_model::correct};
const PairKernels amx_model_pairs = {amx_model::pack, amx_model::gram, &amx_model_tiles};

}  // namespace consistency_ops::cpu
