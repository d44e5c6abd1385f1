/* Solves (A + I) x = b for a matrix with a known answer, through the C interface. */
#include <consistency_ops/c_api.h>
#include <math.h>
#include <stdio.h>

enum { kN = 100 };

int main(void) {
  static double a[kN * kN], b[kN];
  for (int j = 0; j < kN; ++j) {
    for (int i = j; i < kN; ++i) a[j * kN + i] = (i == j ? 2.0 : 1.0); /* ones + identity, lower triangle */
    b[j] = kN + 1.0;                                                   /* A times the vector of ones */
  }
  int32_t info = -1;
  if (co_cholesky_f64(kN, a, kN, &info) != 0 || info != 0) {
    fprintf(stderr, "factorisation failed, info %d\n", (int)info);
    return 1;
  }
  if (co_cholesky_solve_f64(kN, 1, a, kN, b, kN) != 0) return 1;
  double worst = 0;
  for (int i = 0; i < kN; ++i) worst = fmax(worst, fabs(b[i] - 1.0));
  if (!(worst < 1e-12)) {
    fprintf(stderr, "error %g\n", worst);
    return 1;
  }
  if (co_cholesky_f64(257, a, 257, &info) != CO_ERROR_TOO_LARGE) return 1;
  printf("version %d, %s\n", (int)co_version(), co_cpu_isa());
  return 0;
}
