// A libcuda for tests of the launcher: strict about contexts, capture and shared memory, and it remembers launches.
#include <stddef.h>
#include <string.h>

enum { INVALID_VALUE = 1, NO_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900 };
enum { DEVICES = 2, RELAXED = 2, BUFFER_POINTER = 1, BUFFER_SIZE = 2, CLUSTER = 4, MAX_DYNAMIC_SHARED = 8 };
static char contexts[DEVICES], modules[DEVICES], functions[DEVICES];
static __thread char* current;
static __thread int mode;
static int allowed_shared[DEVICES] = {48 * 1024, 48 * 1024};

// What a test reads: numbers of the last launch, its parameters, and how often each function was called.
int stub_launch[16], stub_loads, stub_attributes, stub_encodes, stub_capturing, stub_capability;
size_t stub_count;
unsigned char stub_parameters[1024];
void* stub_stream;
unsigned long long stub_map[10];

static int in_capture(void) { return stub_capturing && mode != RELAXED; }

int cuInit(unsigned flags) { return 0; }
int cuGetErrorString(int code, const char** text) {
    return *text = code == NOT_FOUND ? "named symbol not found" : "stub's words", 0;
}
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal < DEVICES ? 0 : INVALID_VALUE; }
int cuDevicePrimaryCtxRetain(void** found, int device) { return *found = &contexts[device], 0; }
int cuCtxGetCurrent(void** found) { return *found = current, 0; }
int cuCtxSetCurrent(void* wanted) { return current = wanted, 0; }
int cuThreadExchangeStreamCaptureMode(int* wanted) {
    int before = mode;
    return mode = *wanted, *wanted = before, 0;
}
int cuModuleLoadData(void** module, const void* image) {
    if (!current) return INVALID_CONTEXT;
    if (in_capture()) return CAPTURE_UNSUPPORTED;
    if (!strncmp(image, "wrong", 5)) return NO_IMAGE;
    stub_loads++;
    // Of an ELF file's header: version of the ABI, flags, in which the capability has its place by that version.
    const unsigned char* header = image;
    if (header[0] == 0x7f && header[4]) stub_capability = header[8] >= 8 ? header[49] : header[48];
    return *module = &modules[current - contexts], 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
    if (in_capture()) return CAPTURE_UNSUPPORTED;
    if (strncmp(name, "fusedops_", 9)) return NOT_FOUND;
    return *function = &functions[(char*)module - modules], 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != MAX_DYNAMIC_SHARED || value > 227 * 1024) return INVALID_VALUE;
    stub_attributes++;
    return allowed_shared[(char*)function - functions] = value, 0;
}
static int launched(void* function, const unsigned* sizes, unsigned shared, void* stream, void** extra) {
    long device = (char*)function - functions;
    if (!current || current - contexts != device) return INVALID_CONTEXT;
    if (shared > allowed_shared[device]) return INVALID_VALUE;
    if ((size_t)extra[0] != BUFFER_POINTER || (size_t)extra[2] != BUFFER_SIZE || extra[4]) return INVALID_VALUE;
    memcpy(stub_launch, sizes, 6 * sizeof(int));
    stub_launch[6] = shared, stub_launch[7] = device;
    stub_count = *(size_t*)extra[3], stub_stream = stream;
    memcpy(stub_parameters, extra[1], stub_count);
    return 0;
}
struct Config {  // CUlaunchConfig and CUlaunchAttribute
    unsigned sizes[6], shared;
    void* stream;
    struct { int id, pad; unsigned cluster[3], rest[13]; } * attributes;
    unsigned count;
};
int cuLaunchKernelEx(const struct Config* config, void* function, void** parameters, void** extra) {
    if (config->count > 1 || (config->count && config->attributes->id != CLUSTER)) return INVALID_VALUE;
    memset(stub_launch + 8, 0, 3 * sizeof(int));
    if (config->count) memcpy(stub_launch + 8, config->attributes->cluster, 3 * sizeof(int));
    return launched(function, config->sizes, config->shared, config->stream, extra);
}
int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* start, const unsigned long long* sizes,
                           const unsigned long long* strides, const unsigned* box, const unsigned* steps,
                           int interleave, int swizzle, int promotion, int fill) {
    if ((size_t)map % 64 || rank != 2) return INVALID_VALUE;
    const unsigned long long said[10] = {type,       (size_t)start, sizes[0], sizes[1], strides[0], box[0],
                                         box[1],     steps[0] * 10 + steps[1], swizzle, interleave + fill};
    stub_encodes++;
    return memcpy(map, said, sizeof said), 0;
}
