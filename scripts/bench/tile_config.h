// Included before every C++ source of llama.cpp. The _tile_loadconfig of GCC 12 (amxtileintrin.h) tells the compiler
// that it reads 8 of the 64 bytes, so the stores to the others are removed, the AMX kernels load a configuration of
// whatever is on the stack, and llama.cpp ends with a segmentation fault. This one says what it reads.
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%X0" ::"m"(*(const char(*)[64])(config)))
#endif
