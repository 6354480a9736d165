// Products of small matrices, C = X Y, by a micro-kernel that keeps a patch of C in registers.
// Included by epilogue.cpp inside its namespace.
//
// The order of every sum depends on the shapes alone, not on the threads.

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kPatchRows = 8, kPatchVectors = 2;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kPatchRows = 4, kPatchVectors = 3;
#else
constexpr int kVectorBytes = 16, kPatchRows = 4, kPatchVectors = 2;
#endif

constexpr int64_t kDepth = 64;       // terms of a partial sum: short sums round less
constexpr int64_t kPackFrom = 64;    // rows of X from which a block of Y is worth copying
constexpr int64_t kBlockRows = 512;  // rows of C whose sums are kept aside until they are whole

template <class Real>
struct Lanes {
  typedef Real Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(Real)), may_alias));
  typedef Real Quarter __attribute__((vector_size(16), aligned(sizeof(Real)), may_alias));
  static constexpr int kCount = kVectorBytes / int(sizeof(Real));
  static constexpr int kPatchColumns = kPatchVectors * kCount;
};

// A matrix: element (i, j) at data[i * row + j * column]; one of the steps is 1.
template <class Real>
struct Matrix {
  const Real* data;
  int64_t row, column;
};

// Four values of each of four rows of z, as four rows of `out`.
template <class Real, class Source>
void transpose_four(const Source* z, int64_t ldz, Real* out, int64_t ldo) {
#if defined(__SSE__)
  if constexpr (sizeof(Real) == sizeof(float) && sizeof(Source) == sizeof(float)) {
    __m128 row[4];
    for (int n = 0; n < 4; ++n) row[n] = _mm_loadu_ps(z + n * ldz);
    _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
    for (int n = 0; n < 4; ++n) _mm_storeu_ps(out + n * ldo, row[n]);
    return;
  }
#endif
  for (int n = 0; n < 4; ++n)
    for (int m = 0; m < 4; ++m) out[n * ldo + m] = Real(z[m * ldz + n]);
}

// Copies a block of Y [depth, columns] to rows of kPatchColumns; missing columns are 0.
template <class Real, class Source>
void pack(const Matrix<Source>& Y, const Source* y, int64_t depth, int64_t columns, Real* out) {
  constexpr int64_t width = Lanes<Real>::kPatchColumns;
  static_assert(width % 4 == 0, "columns are packed by four");
  if (Y.column == 1) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < width; ++j)
        out[k * width + j] = j < columns ? Real(y[k * Y.row + j]) : Real(0);
    return;
  }
  for (int64_t k = 0; k < depth; k += 4)
    for (int64_t j = 0; j < width; j += 4) {
      if (k + 4 <= depth && j + 4 <= columns) {
        transpose_four(y + j * Y.column + k, Y.column, out + k * width + j, width);
        continue;
      }
      for (int64_t n = k; n < k + 4 && n < depth; ++n)
        for (int64_t m = j; m < j + 4; ++m)
          out[n * width + m] = m < columns ? Real(y[m * Y.column + n]) : Real(0);
    }
}

// out [kRows, kPatchColumns], in rows of ldo, = or += X Y over K terms, in whole vectors.
template <class Real, bool kRowMajor, int kRows>
void multiply_patch(const Matrix<Real>& X, const Real* x, const Real* y, int64_t step, int64_t K,
                    Real* out, int64_t ldo, bool add) {
  using Vector = typename Lanes<Real>::Vector;
  constexpr int kLanes = Lanes<Real>::kCount;
  const int64_t row = kRowMajor ? X.row : 1, column = kRowMajor ? 1 : X.column;
  Vector sum[kRows][kPatchVectors] = {};
  for (int64_t k = 0; k < K; ++k) {
    Vector right[kPatchVectors];
    for (int v = 0; v < kPatchVectors; ++v)
      right[v] = *reinterpret_cast<const Vector*>(y + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Real left = x[r * row];
      for (int v = 0; v < kPatchVectors; ++v) sum[r][v] += left * right[v];
    }
    x += column;
    y += step;
  }
  for (int r = 0; r < kRows; ++r, out += ldo)
    for (int v = 0; v < kPatchVectors; ++v) {
      Vector& total = *reinterpret_cast<Vector*>(out + v * kLanes);
      total = add ? total + sum[r][v] : sum[r][v];
    }
}

template <class Real>
using Patch = void (*)(const Matrix<Real>&, const Real*, const Real*, int64_t, int64_t, Real*,
                       int64_t, bool);

// The kernel for `rows` rows: kPatchRows, or a smaller power of 2.
template <class Real, bool kRowMajor, int kRows = kPatchRows>
Patch<Real> patch_for(int64_t rows) {
  if constexpr (kRows > 1)
    if (rows < kRows) return patch_for<Real, kRowMajor, kRows / 2>(rows);
  return multiply_patch<Real, kRowMajor, kRows>;
}

// Products of few rows with few rows, both contiguous along the terms: sixteen at a time, each sum
// in a vector of its own, so nothing is packed.

#if defined(__AVX512F__)
constexpr int kDotRowsOfX = 4;    // in registers at a time
constexpr int64_t kDotRows = 64;  // up to so many of either: beyond, a copy is used often enough
#else
constexpr int kDotRowsOfX = 2;
constexpr int64_t kDotRows = 48;
#endif
constexpr int kDotRowsOfY = 4;
constexpr int64_t kDotTerms = 64;  // of a lane's partial sum

// The sums over the lanes of four vectors.
template <class Real>
void sum_lanes(const typename Lanes<Real>::Vector* sum, Real* out) {
  constexpr int kQuarters = kVectorBytes / 16, kLanes = 16 / int(sizeof(Real));
  using Quarter = typename Lanes<Real>::Quarter;
  Quarter part[4];
  for (int n = 0; n < 4; ++n) {
    const auto* quarters = reinterpret_cast<const Quarter*>(sum + n);
    part[n] = quarters[0];
    for (int q = 1; q < kQuarters; ++q) part[n] += quarters[q];
  }
#if defined(__SSE__)
  if constexpr (sizeof(Real) == sizeof(float)) {
    __m128 row[4];
    for (int n = 0; n < 4; ++n) row[n] = (__m128)part[n];
    _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
    _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(row[0], row[1]), _mm_add_ps(row[2], row[3])));
    return;
  }
#endif
  for (int n = 0; n < 4; ++n) {
    out[n] = part[n][0];
    for (int lane = 1; lane < kLanes; ++lane) out[n] += part[n][lane];
  }
}

// out [kDotRowsOfX, kDotRowsOfY] = products of rows x with rows y over K terms. Rows that are not
// there may be repeated.
template <class Real>
void multiply_dots(const Real* const* x, const Real* const* y, int64_t K, Real* out) {
  using Vector = typename Lanes<Real>::Vector;
  constexpr int64_t kLanes = Lanes<Real>::kCount, kBlock = kLanes * kDotTerms;
  const int64_t whole = K / kLanes * kLanes;
  for (int n = 0; n < kDotRowsOfX * kDotRowsOfY; ++n) out[n] = 0;
  for (int64_t k0 = 0; k0 < whole; k0 += kBlock) {
    const int64_t end = k0 + kBlock < whole ? k0 + kBlock : whole;
    Vector sum[kDotRowsOfX][kDotRowsOfY] = {};
    for (int64_t k = k0; k < end; k += kLanes) {
      Vector right[kDotRowsOfY];
      for (int j = 0; j < kDotRowsOfY; ++j) right[j] = *reinterpret_cast<const Vector*>(y[j] + k);
      for (int i = 0; i < kDotRowsOfX; ++i) {
        const Vector left = *reinterpret_cast<const Vector*>(x[i] + k);
        for (int j = 0; j < kDotRowsOfY; ++j) sum[i][j] += left * right[j];
      }
    }
    for (int i = 0; i < kDotRowsOfX; ++i) {
      Real part[kDotRowsOfY];
      sum_lanes<Real>(sum[i], part);
      for (int j = 0; j < kDotRowsOfY; ++j) out[i * kDotRowsOfY + j] += part[j];
    }
  }
  for (int64_t k = whole; k < K; ++k)
    for (int i = 0; i < kDotRowsOfX; ++i)
      for (int j = 0; j < kDotRowsOfY; ++j) out[i * kDotRowsOfY + j] += x[i][k] * y[j][k];
}

// C [M, N] = X Y^T of few rows X [M, K], Y [N, K]. `upper`: patches below the diagonal are left
// out.
template <class Real>
void multiply_few(const Real* X, int64_t ldx, const Real* Y, int64_t ldy, int64_t M, int64_t N,
                  int64_t K, Real* C, int64_t ldc, bool upper) {
  for (int64_t i0 = 0; i0 < M; i0 += kDotRowsOfX)
    for (int64_t j0 = upper ? i0 / kDotRowsOfY * kDotRowsOfY : 0; j0 < N; j0 += kDotRowsOfY) {
      const Real *x[kDotRowsOfX], *y[kDotRowsOfY];
      for (int64_t n = 0; n < kDotRowsOfX; ++n) x[n] = X + (i0 + n < M ? i0 + n : M - 1) * ldx;
      for (int64_t n = 0; n < kDotRowsOfY; ++n) y[n] = Y + (j0 + n < N ? j0 + n : N - 1) * ldy;
      Real sums[kDotRowsOfX * kDotRowsOfY];
      multiply_dots(x, y, K, sums);
      for (int64_t i = 0; i < kDotRowsOfX && i0 + i < M; ++i)
        for (int64_t j = 0; j < kDotRowsOfY && j0 + j < N; ++j)
          C[(i0 + i) * ldc + j0 + j] = sums[i * kDotRowsOfY + j];
    }
}

// C [M, N] = X Y, or C += X Y; X [M, K], Y [K, N]. `upper`: patches below the diagonal are left
// out.
template <class Real, class Source, class Out>
__attribute__((noinline)) void multiply(const Matrix<Real>& X, const Matrix<Source>& Y, int64_t M,
                                        int64_t N, int64_t K, Out* C, int64_t ldc, bool add,
                                        bool upper, int threads) {
  constexpr bool same = sizeof(Source) == sizeof(Real), same_out = sizeof(Out) == sizeof(Real);
  constexpr int64_t width = Lanes<Real>::kPatchColumns;
  if constexpr (same && same_out)
    if (X.column == 1 && Y.row == 1 && !add && M <= kDotRows && N <= kDotRows)
      return multiply_few(X.data, X.row, Y.data, Y.column, M, N, K, C, ldc, upper);
  // Rows [r0, r1) of the block of columns from j0 on.
  const auto multiply_block = [&](int64_t r0, int64_t r1, int64_t j0, int64_t columns) {
    const bool at_once = same_out && K <= kDepth && columns == width;  // no sum is left partial
    Real sums[kBlockRows * width], copy[kDepth * width];
    for (int64_t k0 = 0; k0 < K; k0 += kDepth) {
      const int64_t depth = K - k0 < kDepth ? K - k0 : kDepth;
      const Source* source = Y.data + k0 * Y.row + j0 * Y.column;
      const Real* y = reinterpret_cast<const Real*>(source);
      int64_t step = Y.row;
      if (!same || Y.column != 1 || r1 - r0 >= kPackFrom || columns < width) {
        pack(Y, source, depth, columns, copy);
        y = copy;
        step = width;
      }
      for (int64_t i = r0, rows = kPatchRows; i < r1; i += rows) {
        while (rows > r1 - i) rows /= 2;
        const Patch<Real> patch =
            X.column == 1 ? patch_for<Real, true>(rows) : patch_for<Real, false>(rows);
        const Real* x = X.data + i * X.row + k0 * X.column;
        if constexpr (same_out)
          if (at_once) {
            patch(X, x, y, step, depth, C + i * ldc + j0, ldc, add);
            continue;
          }
        patch(X, x, y, step, depth, sums + (i - r0) * width, width, k0 > 0);
      }
    }
    if (at_once) return;
    for (int64_t i = r0; i < r1; ++i) {
      const Real* sum = sums + (i - r0) * width;
      Out* c = C + i * ldc + j0;
      for (int64_t j = 0; j < columns; ++j) c[j] = Out(add ? c[j] + sum[j] : sum[j]);
    }
  };
  auto block = [&](int64_t n) {
    const int64_t j0 = n * width, columns = N - j0 < width ? N - j0 : width;
    const int64_t last = upper && j0 + columns < M ? j0 + columns : M;
    for (int64_t r0 = 0; r0 < last; r0 += kBlockRows)
      multiply_block(r0, last - r0 < kBlockRows ? last : r0 + kBlockRows, j0, columns);
  };
  using Body = decltype(block);
  parallel((N + width - 1) / width, threads,
           [](void* data, int64_t n) { (*static_cast<Body*>(data))(n); }, &block);
}

template <class Real>
void multiply(const Product& p) {
  const Matrix<Real> X{static_cast<const Real*>(p.X), p.x_row, p.x_column};
  const Matrix<Real> Y{static_cast<const Real*>(p.Y), p.y_row, p.y_column};
  multiply(X, Y, p.M, p.N, p.K, static_cast<Real*>(p.C), p.ldc, p.add, false, p.threads);
}
