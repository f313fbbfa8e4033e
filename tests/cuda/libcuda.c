// A libcuda.so.1 without a GPU: answers what Triton's driver and its launchers ask, holds every launch against the
// limits of an H100, and starts nothing. What is wrong is an error, and its text says what.
#include "cuda.h"
#include <stdio.h>
#include <string.h>

#define SHARED 232448       // bytes of a program, of which
#define SHARED_UNASKED 49152 // so many without having been asked for
#define MOST 4096           // kernels that can be loaded

static long launches, modules;
static int shared_of[MOST + 1];
static char wrong[200] = "no error";

static CUresult fail(const char *what, long got) {
  snprintf(wrong, sizeof wrong, "%s: %ld", what, got);
  return CUDA_ERROR_INVALID_VALUE;
}

long mock_launches(void) { return launches; }
long mock_modules(void) { return modules; }

CUresult cuInit(unsigned f) { return 0; }
CUresult cuDriverGetVersion(int *v) { *v = 13000; return 0; }
CUresult cuGetErrorString(CUresult e, const char **s) { *s = wrong; return 0; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)1; return 0; }
CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; return 0; }
CUresult cuCtxGetLimit(size_t *v, CUlimit l) { *v = 0; return 0; }
CUresult cuCtxSetLimit(CUlimit l, size_t v) { return 0; }
CUresult cuDeviceGet(CUdevice *d, int i) { *d = i; return 0; }
CUresult cuDeviceGetCount(int *n) { *n = 1; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)1; return 0; }
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *c) { *c = 0; return 0; }

CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
  switch (a) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *v = SHARED; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *v = 233472; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *v = 132; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *v = 65536; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *v = 32; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *v = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *v = 0; break;
  default: *v = 1;
  }
  return 0;
}

CUresult cuModuleLoadData(CUmodule *m, const void *code) {
  if (memcmp(code, "\x7f" "ELF", 4)) return fail("what was loaded is no ELF file; it begins with", *(const char *)code);
  if (modules == MOST) return fail("more modules than the mock takes", modules);
  *m = (CUmodule)++modules;
  return 0;
}
CUresult cuModuleUnload(CUmodule m) { return 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) { *f = (CUfunction)m; return 0; }
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 128 : 0;
  return 0;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
  if (a != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_NOT_SUPPORTED; // newer than this card
  if (v > SHARED) return fail("bytes of shared memory", v);
  shared_of[(long)f] = v;
  return 0;
}
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; return 0; }
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)v = p; return 0; }
CUresult cuTensorMapEncodeTiled(
    CUtensorMap *t, CUtensorMapDataType d, cuuint32_t r, void *g, const cuuint64_t *s, const cuuint64_t *st,
    const cuuint32_t *b, const cuuint32_t *e, CUtensorMapInterleave i, CUtensorMapSwizzle w,
    CUtensorMapL2promotion l, CUtensorMapFloatOOBfill o) {
  return 0;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **x) {
  long threads = (long)c->blockDimX * c->blockDimY * c->blockDimZ, shared = c->sharedMemBytes;
  launches++;
  if ((long)f < 1 || (long)f > modules) return fail("a launch of a function that was not loaded", (long)f);
  if (c->gridDimX < 1 || c->gridDimX > 2147483647u) return fail("programs along the first axis of a grid", c->gridDimX);
  if (c->gridDimY < 1 || c->gridDimY > 65535) return fail("programs along the second axis of a grid", c->gridDimY);
  if (c->gridDimZ < 1 || c->gridDimZ > 65535) return fail("programs along the third axis of a grid", c->gridDimZ);
  if (threads < 1 || threads > 1024) return fail("threads of a program", threads);
  if (shared > SHARED_UNASKED && shared > shared_of[(long)f]) return fail("bytes of shared memory, not asked for", shared);
  return 0;
}
