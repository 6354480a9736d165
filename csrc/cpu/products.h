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

// out [kRows, kPatchColumns] = or += X Y over K terms, in whole vectors.
template <class Real, bool kRowMajor, int kRows>
void multiply_patch(const Matrix<Real>& X, const Real* x, const Real* y, int64_t step, int64_t K,
                    Real* out, bool add) {
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
  for (int r = 0; r < kRows; ++r, out += Lanes<Real>::kPatchColumns)
    for (int v = 0; v < kPatchVectors; ++v) {
      Vector& total = *reinterpret_cast<Vector*>(out + v * kLanes);
      total = add ? total + sum[r][v] : sum[r][v];
    }
}

template <class Real>
using Patch = void (*)(const Matrix<Real>&, const Real*, const Real*, int64_t, int64_t, Real*,
                       bool);

// The kernel for `rows` rows: kPatchRows, or a smaller power of 2.
template <class Real, bool kRowMajor, int kRows = kPatchRows>
Patch<Real> patch_for(int64_t rows) {
  if constexpr (kRows > 1)
    if (rows < kRows) return patch_for<Real, kRowMajor, kRows / 2>(rows);
  return multiply_patch<Real, kRowMajor, kRows>;
}

// C [M, N] = X Y, or C += X Y; X [M, K], Y [K, N]. `upper`: patches below the diagonal are left
// out.
template <class Real, class Source, class Out>
__attribute__((noinline)) void multiply(const Matrix<Real>& X, const Matrix<Source>& Y, int64_t M,
                                        int64_t N, int64_t K, Out* C, int64_t ldc, bool add,
                                        bool upper, int threads) {
  constexpr bool same = sizeof(Source) == sizeof(Real);
  constexpr int64_t width = Lanes<Real>::kPatchColumns;
  // Rows [r0, r1) of the block of columns from j0 on.
  const auto multiply_block = [&](int64_t r0, int64_t r1, int64_t j0, int64_t columns) {
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
        patch(X, X.data + i * X.row + k0 * X.column, y, step, depth, sums + (i - r0) * width,
              k0 > 0);
      }
    }
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
