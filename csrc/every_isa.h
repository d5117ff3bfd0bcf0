// Includes the file named by TDKD_BODY once for each instruction set, inside its namespace and with
// its code generation on. No include guard.
namespace tdkd::portable {
#include TDKD_BODY
}
#if TDKD_X86
TDKD_AVX2_BEGIN
namespace tdkd::avx2 {
#include TDKD_BODY
}
TDKD_END
TDKD_AVX512_BEGIN
namespace tdkd::avx512 {
#include TDKD_BODY
}
TDKD_END
#endif
#undef TDKD_BODY
