// What Vec does, over arrays of `lanes` elements. No include guard: included once for each
// instruction set.

constexpr int lanes = Vec::width;

template <class T>
inline void widen(const T* x, float* out) {
  store(out, load(x));
}

template <class T>
inline void narrow(const float* x, T* out) {
  store(out, load(x));
}

inline void exp_each(const float* d, float slope_log2e, float lowest, float* out) {
  store(out, exp_of(load(d), all(slope_log2e), all(lowest)));
}

inline void tanh_each(const float* u, float* out) { store(out, tanh_of(load(u))); }
