// The kernels of roa_scan.cpp for one instruction set; included inside a namespace of its own and under its target
// pragma.  Calls no function of another header (see chunk_kernels.inl).
#include "cpu/convert.inl"

template <typename T>
struct Vector {
  static constexpr int kWidth = CO_VECTOR_BYTES / sizeof(T);
  typedef T V __attribute__((vector_size(CO_VECTOR_BYTES)));
  using Word = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Word I __attribute__((vector_size(CO_VECTOR_BYTES)));

  static V load(const T* from) {
    V value;
    __builtin_memcpy(&value, from, sizeof(V));
    return value;
  }
  static void store(T* to, V value) { __builtin_memcpy(to, &value, sizeof(V)); }
  static V all(T value) { return V{} + value; }
  static V choose(I mask, V yes, V no) {
    return __builtin_bit_cast(V, (__builtin_bit_cast(I, yes) & mask) | (__builtin_bit_cast(I, no) & ~mask));
  }
  static V magnitude(V x) { return __builtin_bit_cast(V, __builtin_bit_cast(I, x) & ~sign_bit()); }
  static V with_sign_of(V x, V of) {
    return __builtin_bit_cast(V, __builtin_bit_cast(I, x) | (__builtin_bit_cast(I, of) & sign_bit()));
  }

  // exp(x) for x in [-limit(), 0], to about one unit in the last place; NaN stays NaN.
  static V exp(V x) {
    constexpr bool kSingle = sizeof(T) == 4;
    constexpr T kMagic = kSingle ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^23 or 2^52: rounds to an integer
    constexpr int kFraction = kSingle ? 23 : 52;
    const V shifted = x * T(1.4426950408889634074) + kMagic;
    const V n = shifted - kMagic;
    // ln 2 in two parts, of which the first has few bits.
    V r = x - n * (kSingle ? T(0.693359375) : T(6.93145751953125e-1));
    r = r - n * (kSingle ? T(-2.12194440e-4) : T(1.42860682030941723212e-6));
    V p;
    if constexpr (kSingle) {
      p = all(T(1.9875691500e-4));
      p = p * r + T(1.3981999507e-3);
      p = p * r + T(8.3334519073e-3);
      p = p * r + T(4.1665795894e-2);
      p = p * r + T(1.6666665459e-1);
      p = p * r + T(5.0000001201e-1);
    } else {  // Taylor's; |r| <= ln(2) / 2, so the rest is below 1e-17
      p = all(T(1.0 / 6227020800.0));
      p = p * r + T(1.0 / 479001600.0);
      p = p * r + T(1.0 / 39916800.0);
      p = p * r + T(1.0 / 3628800.0);
      p = p * r + T(1.0 / 362880.0);
      p = p * r + T(1.0 / 40320.0);
      p = p * r + T(1.0 / 5040.0);
      p = p * r + T(1.0 / 720.0);
      p = p * r + T(1.0 / 120.0);
      p = p * r + T(1.0 / 24.0);
      p = p * r + T(1.0 / 6.0);
      p = p * r + T(0.5);
    }
    p = p * (r * r) + r + T(1);
    const I scale = (__builtin_bit_cast(I, shifted) - __builtin_bit_cast(I, all(kMagic)) + (kSingle ? 127 : 1023))
                    << kFraction;
    return p * __builtin_bit_cast(V, scale);
  }

  static V tanh(V x) {
    constexpr T kSaturated = sizeof(T) == 4 ? T(10) : T(22);  // 1 - tanh is below half of the last place
    const V a = magnitude(x);
    const V e = exp((a > kSaturated ? all(kSaturated) : a) * T(-2));
    const V far = (T(1) - e) / (T(1) + e);
    const V z = a * a;
    V near;
    if constexpr (sizeof(T) == 4) {
      near = all(T(-5.70498872745e-3));
      near = near * z + T(2.06390887954e-2);
      near = near * z - T(5.37397155531e-2);
      near = near * z + T(1.33314422036e-1);
      near = near * z - T(3.33332819422e-1);
    } else {
      V top = all(T(-9.64399179425052238628e-1)), bottom = z + T(1.12811678491632931402e2);
      top = top * z - T(9.92877231001918586564e1);
      top = top * z - T(1.61468768441708447952e3);
      bottom = bottom * z + T(2.23548839060100448583e3);
      bottom = bottom * z + T(4.84406305325125486048e3);
      near = top / bottom;
    }
    near = a + a * z * near;
    return with_sign_of(choose(a < T(0.625), near, far), x);
  }

  static V sigmoid(V x) {
    constexpr T kSaturated = sizeof(T) == 4 ? T(87) : T(700);
    const V a = magnitude(x);
    const V e = exp(-(a > kSaturated ? all(kSaturated) : a));
    return choose(x < T(0), e, all(T(1))) / (T(1) + e);
  }

  template <Activation kPhi>
  static V phi(V s) {
    if constexpr (kPhi == Activation::kTanh) return tanh(s);
    if constexpr (kPhi == Activation::kSigmoid) return sigmoid(s);
    if constexpr (kPhi == Activation::kRelu) return s < T(0) ? V{} : s;  // NaN stays NaN
    if constexpr (kPhi == Activation::kSoftsign) return s / (T(1) + magnitude(s));
    if constexpr (kPhi == Activation::kModulus) return magnitude(s);
    return s;
  }

  // phi' from what was kept.
  template <Activation kPhi>
  static V slope(V kept) {
    if constexpr (kPhi == Activation::kTanh) return T(1) - kept * kept;
    if constexpr (kPhi == Activation::kSigmoid) return kept * (T(1) - kept);
    if constexpr (kPhi == Activation::kRelu) return kept > T(0) ? all(T(1)) : V{};
    if constexpr (kPhi == Activation::kSoftsign) {
      const V rest = T(1) - magnitude(kept);
      return rest * rest;
    }
    if constexpr (kPhi == Activation::kModulus) return kept < T(0) ? all(T(-1)) : all(T(1));
    return all(T(1));
  }

 private:
  static I sign_bit() { return I{} + (Word{1} << (8 * sizeof(T) - 1)); }
};

// Products of a few rows with a packed matrix: panels of kLanes columns, whose rows lie one after the other.  Every sum
// runs over k in ascending order, whatever the number of rows at once, so that a row does not depend on its neighbours.
template <typename T>
struct PackedProduct {
  using Vec = Vector<T>;
  using V = typename Vec::V;
  static constexpr int kLanes = 2 * Vec::kWidth, kRows = CO_VECTOR_BYTES == 64 ? 12 : 6;

  // packed = matrix^T where kTransposed, else matrix; both [units, units].
  template <bool kTransposed, typename S>
  static void pack(const S* matrix, int64_t units, int64_t width, T* packed) {
    for (int64_t c0 = 0; c0 < width; c0 += kLanes) {
      T* panel = packed + c0 * units;
      const int64_t columns = units - c0 < kLanes ? units - c0 : kLanes;
      for (int64_t k = 0; k < units; ++k) {
        for (int64_t c = columns; c < kLanes; ++c) panel[k * kLanes + c] = 0;
      }
      if constexpr (kTransposed) {
        for (int64_t c = 0; c < columns; ++c) {
          for (int64_t k = 0; k < units; ++k) panel[k * kLanes + c] = widen(matrix[(c0 + c) * units + k]);
        }
      } else {
        for (int64_t k = 0; k < units; ++k) {
          for (int64_t c = 0; c < columns; ++c) panel[k * kLanes + c] = widen(matrix[k * units + c0 + c]);
        }
      }
    }
  }

  template <int kCount>
  static void few_rows(const T* h, const T* panel, T* out, int64_t units, int64_t width) {
    V sum[kCount][2];
    for (int r = 0; r < kCount; ++r) {
      sum[r][0] = Vec::load(out + r * width);
      sum[r][1] = Vec::load(out + r * width + Vec::kWidth);
    }
    for (int64_t k = 0; k < units; ++k) {
      const V left = Vec::load(panel + k * kLanes), right = Vec::load(panel + k * kLanes + Vec::kWidth);
#pragma GCC unroll 12
      for (int r = 0; r < kCount; ++r) {
        const T factor = h[r * width + k];
        sum[r][0] += left * factor;
        sum[r][1] += right * factor;
      }
    }
    for (int r = 0; r < kCount; ++r) {
      Vec::store(out + r * width, sum[r][0]);
      Vec::store(out + r * width + Vec::kWidth, sum[r][1]);
    }
  }

  template <int kCount>
  static void some_rows(int count, const T* h, const T* panel, T* out, int64_t units, int64_t width) {
    if constexpr (kCount > 1) {
      if (count < kCount) return some_rows<kCount - 1>(count, h, panel, out, units, width);
    }
    few_rows<kCount>(h, panel, out, units, width);
  }

  // out += h packed, for rows of `width` elements.
  static void add(const T* h, const T* packed, T* out, int64_t rows, int64_t units, int64_t width) {
    const int64_t parts = (rows + kRows - 1) / kRows;
    for (int64_t c0 = 0; c0 < width; c0 += kLanes) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
        some_rows<kRows>(static_cast<int>(end - begin), h + begin * width, packed + c0 * units,
                         out + begin * width + c0, units, width);
      }
    }
  }
};

template <typename S, typename T>
struct RoaScan {
  using Vec = Vector<T>;
  using V = typename Vec::V;
  using Product = PackedProduct<T>;

  static int64_t width_of(int64_t units) { return (units + Product::kLanes - 1) / Product::kLanes * Product::kLanes; }

  template <bool kTransposed>
  static void pack(const void* matrix, int64_t units, void* packed) {
    Product::template pack<kTransposed>(static_cast<const S*>(matrix), units, width_of(units), static_cast<T*>(packed));
  }

  static void widen_row(const S* from, int64_t units, T* to) {
    for (int64_t j = 0; j < units; ++j) to[j] = widen(from[j]);
  }
  static void narrow_row(const T* from, int64_t units, S* to) {
    int64_t j = 0;
    for (; j + Vec::kWidth <= units; j += Vec::kWidth) narrow_all<Vec::kWidth>(from + j, to + j);
    for (; j < units; ++j) to[j] = narrow<S>(from[j]);
  }

  // Moved by the permutation of a step, or as it is; the elements beyond the last unit are not read by anybody.
  static void move_row(const T* from, const int64_t* index, int64_t units, T* to) {
    for (int64_t j = 0; j < units; ++j) to[j] = from[index[j]];
  }

  // Rows [first, first + rows) through all steps.  room: see room_of.
  template <Activation kPhi>
  static void forward(const RoaScanParams& p, const Packed& packed, int64_t first, int64_t rows, void* room) {
    const int64_t units = p.units, width = width_of(units), block = rows * width;
    const S *drive = static_cast<const S*>(p.drive), *initial = static_cast<const S*>(p.initial);
    S *states = static_cast<S*>(p.states), *kept = static_cast<S*>(p.kept), *last = static_cast<S*>(p.last);
    T *h = static_cast<T*>(room), *s = h + block, *past = s + block;
    T *weight = past + block, *filter = weight + units * width;
    const V alpha = Vec::all(static_cast<T>(p.maps.alpha)), beta = Vec::all(static_cast<T>(p.maps.beta));
    __builtin_memset(h, 0, 3 * block * sizeof(T));
    for (int64_t r = 0; r < rows; ++r) widen_row(initial + (first + r) * units, units, h + r * width);
    for (int64_t t = 0; t < p.steps; ++t) {
      const T* w = static_cast<const T*>(packed.weight);
      if (w == nullptr) {
        pack<true>(static_cast<const S*>(p.maps.weight) + t * p.maps.weight_step, units, weight);
        w = weight;
      }
      for (int64_t r = 0; r < rows; ++r) {
        widen_row(drive + t * p.drive_step + (first + r) * p.drive_row, units, s + r * width);
      }
      Product::add(h, w, s, rows, units, width);
      const T* before = h;
      if (p.maps.index != nullptr) {
        const int64_t* index = p.maps.index + t * p.maps.index_step;
        for (int64_t r = 0; r < rows; ++r) move_row(h + r * width, index, units, past + r * width);
        before = past;
      } else if (p.maps.filter != nullptr) {
        const T* o = static_cast<const T*>(packed.filter);
        if (o == nullptr) {
          pack<true>(static_cast<const S*>(p.maps.filter) + t * p.maps.filter_step, units, filter);
          o = filter;
        }
        __builtin_memset(past, 0, block * sizeof(T));
        Product::add(h, o, past, rows, units, width);
        before = past;
      }
      for (int64_t i = 0; i < block; i += Vec::kWidth) {
        const V sum = Vec::load(s + i), y = Vec::template phi<kPhi>(sum);
        if constexpr (kPhi != Activation::kModulus) Vec::store(s + i, y);
        Vec::store(h + i, alpha * Vec::load(before + i) + beta * y);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (t * p.rows + first + r) * units;
        narrow_row(h + r * width, units, states + at);
        if (kept != nullptr) narrow_row(s + r * width, units, kept + at);
      }
      // What the padding has become must not reach Inf or NaN, which are slow.
      if (width != units) clear_padding(rows, units, width, h, s);
    }
    for (int64_t r = 0; r < rows; ++r) narrow_row(h + r * width, units, last + (first + r) * units);
  }

  template <Activation kPhi>
  static void backward(const RoaScanBackwardParams& p, const Packed& packed, int64_t first, int64_t rows, void* room) {
    const int64_t units = p.units, width = width_of(units), block = rows * width;
    const S *grad_states = static_cast<const S*>(p.grad_states), *grad_last = static_cast<const S*>(p.grad_last);
    const S* kept = static_cast<const S*>(p.kept);
    S *deltas = static_cast<S*>(p.delta), *grad_initial = static_cast<S*>(p.grad_initial);
    T *g = static_cast<T*>(room), *delta = g + block, *next = delta + block;
    T *weight = next + block, *filter = weight + units * width;
    const V beta = Vec::all(static_cast<T>(p.maps.beta)), alpha = Vec::all(static_cast<T>(p.maps.alpha));
    __builtin_memset(g, 0, 3 * block * sizeof(T));
    if (grad_last != nullptr) {
      for (int64_t r = 0; r < rows; ++r) widen_row(grad_last + (first + r) * units, units, g + r * width);
    }
    for (int64_t t = p.steps - 1; t >= 0; --t) {
      const T* w = static_cast<const T*>(packed.weight);
      if (w == nullptr) {
        pack<false>(static_cast<const S*>(p.maps.weight) + t * p.maps.weight_step, units, weight);
        w = weight;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (t * p.rows + first + r) * units;
        if (grad_states != nullptr) {
          const S* from = grad_states + t * p.grad_step + (first + r) * p.grad_row;
          for (int64_t j = 0; j < units; ++j) g[r * width + j] += widen(from[j]);
        }
        widen_row(kept + at, units, delta + r * width);
      }
      for (int64_t i = 0; i < block; i += Vec::kWidth) {
        const V grad = Vec::load(g + i);
        Vec::store(delta + i, beta * grad * Vec::template slope<kPhi>(Vec::load(delta + i)));
        Vec::store(g + i, alpha * grad);
      }
      for (int64_t r = 0; r < rows; ++r) {
        narrow_row(delta + r * width, units, deltas + (t * p.rows + first + r) * units);
      }
      T* after = g;
      if (p.maps.index != nullptr) {
        const int64_t* inverse = p.maps.index + t * p.maps.index_step;
        for (int64_t r = 0; r < rows; ++r) move_row(g + r * width, inverse, units, next + r * width);
        after = next;
      } else if (p.maps.filter != nullptr) {
        const T* o = static_cast<const T*>(packed.filter);
        if (o == nullptr) {
          pack<false>(static_cast<const S*>(p.maps.filter) + t * p.maps.filter_step, units, filter);
          o = filter;
        }
        __builtin_memset(next, 0, block * sizeof(T));
        Product::add(g, o, next, rows, units, width);
        after = next;
      }
      Product::add(delta, w, after, rows, units, width);
      if (after != g) {
        next = g;
        g = after;
      }
      if (width != units) clear_padding(rows, units, width, g, delta);
    }
    for (int64_t r = 0; r < rows; ++r) narrow_row(g + r * width, units, grad_initial + (first + r) * units);
  }

  static void clear_padding(int64_t rows, int64_t units, int64_t width, T* one, T* two) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = units; j < width; ++j) one[r * width + j] = two[r * width + j] = 0;
    }
  }

  // Bytes for `rows` rows, and for packed matrices of their own.
  static int64_t room_of(int64_t rows, int64_t units) {
    return static_cast<int64_t>(sizeof(T)) * width_of(units) * (3 * rows + 2 * units);
  }
  static int64_t packed_bytes(int64_t units) { return static_cast<int64_t>(sizeof(T)) * width_of(units) * units; }
};

template <typename S, typename T>
constexpr ScanKernels scan_table() {
  using K = RoaScan<S, T>;
  return {K::template pack<true>,
          K::template pack<false>,
          {K::template forward<Activation::kIdentity>, K::template forward<Activation::kTanh>,
           K::template forward<Activation::kSigmoid>, K::template forward<Activation::kRelu>,
           K::template forward<Activation::kSoftsign>, K::template forward<Activation::kModulus>},
          {K::template backward<Activation::kIdentity>, K::template backward<Activation::kTanh>,
           K::template backward<Activation::kSigmoid>, K::template backward<Activation::kRelu>,
           K::template backward<Activation::kSoftsign>, K::template backward<Activation::kModulus>},
          K::room_of,
          K::packed_bytes};
}

const ScanKernels kScanTable[4] = {scan_table<float, float>(), scan_table<double, double>(),
                                   scan_table<BFloat16, float>(), scan_table<Float16, float>()};
