/* The launchers of the C interface on the CPU: the correction of a small gradient in several chunks, the modulus and
 * batch RMS norm, each against a few lines of double. */
#include <consistency_ops/c_api.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { kRows = 60, kUnits = 20, kOutputs = 5, kChunk = 8, kChunks = 3, kNumel = 101 };

#define REQUIRE(condition)                                                          \
  do {                                                                              \
    if (!(condition)) {                                                             \
      fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      return 1;                                                                     \
    }                                                                               \
  } while (0)

static float next_random(uint32_t* state) {
  *state = *state * 1664525u + 1013904223u;
  return (float)(*state >> 8) / (1 << 23) - 1.0f;
}

static void fill(float* values, int count, uint32_t seed) {
  for (int i = 0; i < count; ++i) values[i] = next_random(&seed);
}

/* A pool that runs the tasks on this thread, the last one first. */
static void run_backwards(void* context, int64_t tasks, void (*task)(void*, int64_t), void* argument) {
  *(int64_t*)context += tasks;
  for (int64_t i = tasks; i-- > 0;) task(argument, i);
}

/* The largest |corrected (A_c + damping I) - g| over the chunks, which is 0 for the exact answer. */
static double residual(const float* x, const float* g, const float* corrected, const int64_t* units, double damping) {
  double worst = 0;
  const int size = (kUnits + kChunks - 1) / kChunks; /* equal within one */
  for (int first = 0, chunk = 0; chunk < kChunks; ++chunk) {
    const int here = chunk < kUnits - (size - 1) * kChunks ? size : size - 1;
    for (int o = 0; o < kOutputs; ++o) {
      for (int j = 0; j < here; ++j) {
        const int64_t column = units[first + j];
        double sum = damping * corrected[o * kUnits + column] - g[o * kUnits + column];
        for (int i = 0; i < here; ++i) {
          double covariance = 0;
          for (int r = 0; r < kRows; ++r) {
            covariance += (double)x[r * kUnits + units[first + i]] * x[r * kUnits + column];
          }
          sum += corrected[o * kUnits + units[first + i]] * covariance / kRows;
        }
        worst = fmax(worst, fabs(sum));
      }
    }
    first += here;
  }
  return worst;
}

static int correct(void) {
  float x[kRows * kUnits], g[kOutputs * kUnits], one[kOutputs * kUnits], two[kOutputs * kUnits];
  fill(x, kRows * kUnits, 1);
  fill(g, kOutputs * kUnits, 2);
  memcpy(one, g, sizeof g);
  memcpy(two, g, sizeof g);
  int32_t info[kChunks] = {-1, -1, -1};
  float damping_used[kChunks];

  co_precondition_layer layer = {0};
  layer.x = x;
  for (int d = 0; d < 4; ++d) layer.x_row_size[d] = 1;
  layer.x_row_size[3] = kRows;
  layer.x_row_stride[3] = kUnits;
  layer.x_unit_stride = 1;
  layer.units = kUnits;
  layer.g = one;
  layer.outputs = kOutputs;
  layer.g_output_stride = kUnits;
  layer.g_unit_stride = 1;
  for (int d = 0; d < 3; ++d) layer.g_tap_size[d] = 1;
  layer.layer = 7;
  layer.group = 1;
  layer.info = info;
  layer.damping_used = damping_used;
  co_precondition_options options = {0};
  options.damping = 0.1;
  options.chunk = kChunk;
  options.max_rows = kRows;
  options.seed = 3;
  options.step = 4;
  options.stages = CO_STAGE_ALL;

  REQUIRE(co_precondition_cpu(&layer, 1, &options, NULL) == 0);
  int64_t units[kUnits];
  REQUIRE(co_division(kUnits, kChunk, 1, 3, 4, 7, units) == 0);
  const double error = residual(x, g, one, units, 0.1);
  printf("residual %g\n", error);
  REQUIRE(error < 1e-5);
  for (int c = 0; c < kChunks; ++c) REQUIRE(info[c] == 0 && damping_used[c] == 0.1f);
  REQUIRE(memcmp(one, g, sizeof g) != 0);

  int64_t tasks = 0;
  const co_thread_pool pool = {run_backwards, &tasks, 3};
  layer.g = two;
  REQUIRE(co_precondition_cpu(&layer, 1, &options, &pool) == 0);
  REQUIRE(memcmp(one, two, sizeof g) == 0);
  REQUIRE(co_precondition_workspace_cpu(&layer, 1, &options, 1) > 0);
  REQUIRE(co_precondition_cpu(NULL, 0, &options, NULL) == 0);

  /* Two gradients of one X: the second layer is told by its gradient alone. */
  memcpy(one, g, sizeof g);
  memcpy(two, g, sizeof g);
  co_precondition_layer pair[2] = {layer, {0}};
  pair[0].g = one;
  pair[1].same_input = true;
  pair[1].units = kUnits;
  pair[1].g = two;
  pair[1].outputs = kOutputs;
  pair[1].g_output_stride = kUnits;
  pair[1].g_unit_stride = 1;
  for (int d = 0; d < 3; ++d) pair[1].g_tap_size[d] = 1;
  REQUIRE(co_precondition_cpu(pair, 2, &options, NULL) == 0);
  REQUIRE(residual(x, g, one, units, 0.1) < 1e-5 && memcmp(one, two, sizeof g) == 0);
  REQUIRE(co_precondition_cpu(pair + 1, 1, &options, NULL) == CO_ERROR_INVALID_ARGUMENT);

  /* What is refused changes nothing. */
  memcpy(two, g, sizeof g);
  options.chunk = 257;
  REQUIRE(co_precondition_cpu(&layer, 1, &options, NULL) == CO_ERROR_INVALID_ARGUMENT);
  options.chunk = kChunk;
  options.damping = -1;
  REQUIRE(co_precondition_cpu(&layer, 1, &options, NULL) == CO_ERROR_INVALID_ARGUMENT);
  options.damping = 0.1;
  layer.x_dtype = 4;
  REQUIRE(co_precondition_cpu(&layer, 1, &options, NULL) == CO_ERROR_INVALID_ARGUMENT);
  layer.x_dtype = CO_FLOAT32;
  REQUIRE(co_precondition_cpu(&layer, 1, NULL, NULL) == CO_ERROR_INVALID_ARGUMENT);
  REQUIRE(co_precondition_cpu(NULL, 1, &options, NULL) == CO_ERROR_INVALID_ARGUMENT);
  REQUIRE(co_precondition_cpu(&layer, -1, &options, NULL) == CO_ERROR_INVALID_ARGUMENT);
  REQUIRE(co_precondition_workspace_cpu(&layer, 1, NULL, 1) == CO_ERROR_INVALID_ARGUMENT);
  REQUIRE(memcmp(g, two, sizeof g) == 0);
  return 0;
}

static int modulus(void) {
  float x[kNumel], y[kNumel], grad[kNumel], grad_x[kNumel];
  uint8_t signs[(kNumel + 7) / 8];
  fill(x, kNumel, 5);
  fill(grad, kNumel, 6);
  x[0] = -0.0f;
  REQUIRE(co_modulus_cpu(CO_FLOAT32, kNumel, x, y, signs, NULL) == 0);
  REQUIRE(co_modulus_backward_cpu(CO_FLOAT32, kNumel, grad, signs, grad_x, NULL) == 0);
  for (int i = 0; i < kNumel; ++i) {
    REQUIRE(y[i] == fabsf(x[i]) && !signbit(y[i]));
    REQUIRE((signs[i / 8] >> i % 8 & 1) == (x[i] < 0));
    REQUIRE(grad_x[i] == (x[i] < 0 ? -grad[i] : grad[i]));
  }
  REQUIRE(co_modulus_cpu(CO_FLOAT32, kNumel, x, x, NULL, NULL) == 0 && memcmp(x, y, sizeof x) == 0); /* in place */
  REQUIRE(co_modulus_cpu(CO_FLOAT32, 0, NULL, NULL, NULL, NULL) == 0);
  REQUIRE(co_modulus_cpu(4, kNumel, x, y, NULL, NULL) == CO_ERROR_INVALID_ARGUMENT);
  REQUIRE(co_modulus_cpu(CO_FLOAT32, -1, x, y, NULL, NULL) == CO_ERROR_INVALID_ARGUMENT);
  REQUIRE(co_modulus_backward_cpu(-1, kNumel, grad, signs, grad_x, NULL) == CO_ERROR_INVALID_ARGUMENT);

  const double z[4] = {3, -4, 0, 0};
  const double ones[2] = {1, 1};
  double magnitude[2], direction[4];
  REQUIRE(co_complex_modulus_cpu(CO_FLOAT64, 2, z, magnitude, NULL) == 0 && magnitude[0] == 5 && magnitude[1] == 0);
  REQUIRE(co_complex_modulus_backward_cpu(CO_FLOAT64, 2, ones, z, direction, NULL) == 0);
  REQUIRE(fabs(direction[0] - 0.6) < 1e-15 && fabs(direction[1] + 0.8) < 1e-15);
  REQUIRE(direction[2] == 0 && direction[3] == 0);
  REQUIRE(co_complex_modulus_cpu(CO_FLOAT16, 2, z, magnitude, NULL) == CO_ERROR_INVALID_ARGUMENT);
  return 0;
}

static int batch_rms_norm(void) {
  enum { kBatch = 12, kChannels = 3 };
  float x[kBatch * kChannels], y[kBatch * kChannels];
  double running[kChannels] = {0}, denominator[kChannels], expected[kChannels], largest = 0;
  int64_t count = 0;
  fill(x, kBatch * kChannels, 8);
  const co_channel_view view = {kBatch, kChannels, 1, kChannels, 1, 1};
  REQUIRE(co_batch_rms_norm_denominator_cpu(CO_FLOAT32, x, &view, CO_FLOAT64, running, &count, CO_FLOAT64, denominator,
                                            0.1, 0.01, NULL) == 0);
  REQUIRE(count == 1);
  for (int c = 0; c < kChannels; ++c) {
    double mean = 0;
    for (int i = 0; i < kBatch; ++i) mean += (double)x[i * kChannels + c] * x[i * kChannels + c] / kBatch;
    REQUIRE(fabs(running[c] - 0.9 * mean) < 1e-7); /* squares are summed in float32, in short runs */
    expected[c] = running[c] / (1 - 0.1);
    largest = fmax(largest, running[c] + 1e-6);
  }
  float d[kChannels];
  for (int c = 0; c < kChannels; ++c) {
    REQUIRE(fabs(denominator[c] - sqrt(expected[c] + 0.01 * largest)) < 1e-12);
    d[c] = (float)denominator[c];
  }
  REQUIRE(co_channel_divide_cpu(CO_FLOAT32, x, &view, y, &view, d, NULL) == 0);
  for (int i = 0; i < kBatch * kChannels; ++i) REQUIRE(fabsf(y[i] - x[i] / d[i % kChannels]) < 1e-6f);
  REQUIRE(co_channel_divide_cpu(CO_FLOAT32, x, NULL, y, &view, d, NULL) == CO_ERROR_INVALID_ARGUMENT);
  REQUIRE(co_batch_rms_norm_denominator_cpu(CO_FLOAT32, x, &view, 9, running, NULL, CO_FLOAT64, denominator, 0.1, 0.01,
                                            NULL) == CO_ERROR_INVALID_ARGUMENT);
  return 0;
}

int main(void) { return correct() || modulus() || batch_rms_norm(); }
