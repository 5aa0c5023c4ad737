// A libcuda for tests: device memory is the host's, and every launch writes what it was given to its first argument.
#include <cuda.h>
#include <stdlib.h>
#include <string.h>

#undef cuMemAlloc
#undef cuMemcpyHtoD
#undef cuMemcpyDtoH
#undef cuMemFree
#undef cuDevicePrimaryCtxRetain

static int live;

CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    return *context = (CUcontext)&live, CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
    return context == (CUcontext)&live ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult cuDeviceGetName(char* name, int room, CUdevice device) { return strncpy(name, "Stub", room), CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9 : 0;
    return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* version) { return *version = 13010, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult code, const char** words) { return *words = "stubborn", CUDA_SUCCESS; }
CUresult cuCtxSynchronize(void) { return CUDA_SUCCESS; }
CUresult cuMemAlloc_v2(CUdeviceptr* place, size_t bytes) {
    live++;
    return *place = (CUdeviceptr)aligned_alloc(256, (bytes + 255) / 256 * 256), CUDA_SUCCESS;
}
CUresult cuMemFree_v2(CUdeviceptr place) { return live--, free((void*)place), CUDA_SUCCESS; }
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    return memcpy((void*)to, from, bytes), CUDA_SUCCESS;
}
CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    return memcpy(to, (void*)from, bytes), CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule* module, const void* text, unsigned count, CUjit_option* options, void** values) {
    *module = (CUmodule)strdup(text);
    if (strcmp(text, "wrong")) return CUDA_SUCCESS;
    for (unsigned i = 0; i < count; i++)
        if (options[i] == CU_JIT_ERROR_LOG_BUFFER) strcpy(values[i], "line 1: no");
    return CUDA_ERROR_INVALID_PTX;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    *function = (CUfunction)module;
    return strcmp(name, "k") ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    return attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
    cuuint64_t said[16] = {type, rank, *(unsigned char*)address, sizes[0], sizes[1], strides[0], box[0], box[1],
                           element_strides[0], interleave, swizzle, promotion, fill, (size_t)map % 64};
    return memcpy(map, said, sizeof said), CUDA_SUCCESS;
}
// Parameters: the place of 32 numbers, a number of 4 bytes, a tensor map.
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
    cuuint64_t* out = *(cuuint64_t**)parameters[0];
    cuuint64_t said[16] = {config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY,
                           config->blockDimZ, config->sharedMemBytes, (size_t)config->hStream, config->numAttrs,
                           *(unsigned*)parameters[1], (size_t)out % 256, live};
    if (config->numAttrs) {
        said[12] = config->attrs[0].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        said[13] = config->attrs[0].value.clusterDim.x;
        said[14] = config->attrs[0].value.clusterDim.y;
        said[15] = config->attrs[0].value.clusterDim.z;
    }
    memcpy(out, said, sizeof said);
    memcpy(out + 16, parameters[2], 128);
    return CUDA_SUCCESS;
}
