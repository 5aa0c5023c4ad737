// A libcuda.so.1 that accepts everything and runs nothing: what is left of a launch is the host's part.
#include <stddef.h>
#include <string.h>

typedef unsigned long long address;
static void* context;
static long launches;

long stub_launches(void) { return launches; }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuGetErrorString(int code, const char** text) { return *text = "an error of the stub", 0; }
int cuDevicePrimaryCtxRetain(void** found, int device) { return *found = &context, 0; }
int cuCtxGetCurrent(void** found) { return *found = context, 0; }
int cuCtxSetCurrent(void* wanted) { return context = wanted, 0; }
int cuThreadExchangeStreamCaptureMode(int* mode) { return 0; }
int cuCtxGetLimit(size_t* value, int limit) { return *value = 0, 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }

// The numbers of cuda.h's CUdevice_attribute, with an H100's values.
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    switch (attribute) {
        case 8: *value = 49152; break;    // shared memory of a block
        case 10: *value = 32; break;      // warp size
        case 12: *value = 65536; break;   // registers of a block
        case 16: *value = 132; break;     // multiprocessors
        case 75: *value = 9; break;       // compute capability
        case 76: *value = 0; break;
        case 97: *value = 232448; break;  // shared memory of a block that asks for it
        default: *value = 1;
    }
    return 0;
}
int cuModuleLoadData(void** module, const void* image) { return *module = &launches, 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { return *function = &launches, 0; }
int cuFuncGetAttribute(int* value, int attribute, void* function) { return *value = attribute == 0 ? 1024 : 0, 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int* count, void* function, const void* config) { return *count = 66, 0; }

// Memory is the host's: attribute 3 asks for the address that a device would use.
int cuPointerGetAttribute(void* value, int attribute, address pointer) {
    if (attribute == 3) return *(address*)value = pointer, 0;
    return *(int*)value = 0, 0;
}
int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* start, const void* sizes, const void* strides,
                           const void* box, const void* steps, int interleave, int swizzle, int promotion, int fill) {
    return memset(map, 1, 128), 0;
}
int cuLaunchKernelEx(const void* config, void* function, void** arguments, void** extra) { return launches++, 0; }
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz,
                   unsigned shared, void* stream, void** arguments, void** extra) {
    return launches++, 0;
}
