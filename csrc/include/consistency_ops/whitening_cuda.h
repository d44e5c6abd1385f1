// The CUDA launchers of whitening.h: what mode="whiten" needs beside the optimizer's own step, in two launches for all
// layers.  sm_80 and newer; needs no torch and no CUDA header.  Nothing of it has ever run on a GPU.
#pragma once

#include "consistency_ops/precondition_cuda.h"
#include "consistency_ops/whitening.h"

namespace consistency_ops {

// As whiten_cpu and unwhiten_cpu, queued on `stream` like precondition_cuda, with its types, bounds, workspace and
// counters; all pointers are to device memory, also those of WhitenedLayer.  Differences:
//
//   has_gradient    must be given, entries of one array that begins with that of the first layer and is zero before
//                   whiten_cuda.  unwhiten_cuda reads it in place of `moves`.
//   squares         float, [2] an entry of has_gradient, zero before: only layers that move are written.
//   first           true: unwhiten_cuda has no groups of convolutions (their norm is one for all of them).
//   same rows       a launch is always a task queue; tuning.rung is not looked at.
Status whiten_cuda(const PreconditionLayer* layers, const WhitenedLayer* whitened, int64_t count,
                   const PreconditionOptions& options, const WhiteningOptions& whitening, const CudaDevice& device,
                   void* workspace, void* stream, const CudaTuning& tuning = {});

Status unwhiten_cuda(const PreconditionLayer* layers, const WhitenedLayer* whitened, int64_t count,
                     const PreconditionOptions& options, const WhiteningOptions& whitening, float* squares,
                     const CudaDevice& device, void* workspace, void* stream, const CudaTuning& tuning = {});

// Bytes of their workspaces, as precondition_workspace_cuda.
int64_t whitening_workspace_cuda(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                                 const WhiteningOptions& whitening, bool unwhitens, const CudaTuning& tuning = {});

}  // namespace consistency_ops
