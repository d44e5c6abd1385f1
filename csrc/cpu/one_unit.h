// Layers of one unit: the channels of a depthwise convolution, each with a covariance of one number, or of 2 x 2 with
// the bias.
//
// There are hundreds in one convolution, and through panels, tiles and tasks each would take a microsecond.  Here the
// sums of neighbouring channels are vectors, and the correction of a channel is a product with a number.
#pragma once

#include "consistency_ops/precondition.h"
#include "cpu/plan.h"

namespace consistency_ops::cpu {

// Whether precondition_cpu leaves layer l to correct_one_unit, and make_plan leaves it out of its tasks.
inline bool has_one_unit(const PreconditionLayer* layers, int64_t count, int64_t l,
                         const PreconditionOptions& options) {
  const PreconditionLayer& layer = layers[l];
  const bool alone = !layer.same_input && (l + 1 == count || !layers[l + 1].same_input);
  return alone && layer.units == 1 && options.stages == kStageAll && layer.covariance == nullptr &&
         layer.inverse == nullptr && layer.permutation == nullptr && (!layer.has_bias || options.chunk > 1);
}

// Corrects all those layers.  As everywhere, results depend neither on the threads nor on the other layers.
void correct_one_unit(const PreconditionLayer* layers, const PreconditionOptions& options, const Plan& plan,
                      const ThreadPool& pool);

}  // namespace consistency_ops::cpu
