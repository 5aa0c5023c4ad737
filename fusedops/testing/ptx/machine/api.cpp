// What Python calls: programs, launches, descriptions. Errors come back as text.
#include <cstring>

#include "decoder.h"
#include "launch.h"
#include "tensor_map.h"

using namespace ptx;

#define PUBLIC extern "C" __attribute__((visibility("default")))

namespace {

int answer(const std::string& text, char* into, size_t room, int code) {
    if (room) {
        strncpy(into, text.c_str(), room - 1);
        into[room - 1] = '\0';
    }
    return code;
}

}  // namespace

// The fields of a launch, as launch.py declares them.
struct LaunchRequest {
    const char* kernel;
    uint32_t grid[3], block[3], cluster[3];
    uint32_t dynamic_shared;
    uint32_t parameters;                      // their number
    const void* const* values;                // where each lies
    uint32_t allocations;
    const uint64_t *begins, *ends;
    const char* const* names;
    const uint8_t* writable;
    int32_t order, async, blocks_reversed;
    uint32_t quantum;
    uint64_t seed;
    uint32_t checks;
    uint64_t max_steps;                       // 0: the default
    uint64_t steps;                           // out
};

PUBLIC void* ptx_load(const char* text, char* error, size_t room) {
    try {
        return new Program(text);
    } catch (const std::exception& problem) {
        answer(problem.what(), error, room, 1);
        return nullptr;
    }
}

PUBLIC void ptx_unload(void* program) { delete static_cast<Program*>(program); }

// One line for each kernel: name, static shared memory, required threads and cluster (0: not said), then
// type:bytes:name of each parameter.
PUBLIC int ptx_describe(const void* program, char* into, size_t room) {
    std::string text;
    for (auto& code : static_cast<const Program*>(program)->codes) {
        const Kernel& kernel = *code.kernel;
        const unsigned *threads = kernel.required_threads, *cluster = kernel.required_cluster;
        text += format("%s %u %u,%u,%u %u,%u,%u", kernel.name.c_str(), code.static_shared, threads[0], threads[1],
                       threads[2], cluster[0], cluster[1], cluster[2]);
        for (auto& one : kernel.parameters)
            text += format(" %s:%llu:%s", one.type.c_str(), (unsigned long long)(bytes_of(one.type) * one.elements),
                           one.name.c_str());
        text += "\n";
    }
    return answer(text, into, room, text.size() >= room);
}

// One line for each entry of the instruction table: name and section of the PTX ISA.
PUBLIC int ptx_instructions(char* into, size_t room) {
    std::string text;
    for (auto& entry : all_entries()) text += std::string(entry.name) + " " + entry.section + "\n";
    return answer(text, into, room, text.size() >= room);
}

PUBLIC int ptx_launch(const void* program, LaunchRequest* request, char* error, size_t room) {
    try {
        const Program& loaded = *static_cast<const Program*>(program);
        const Code& code = loaded.find(request->kernel);
        Launch launch(loaded, code);
        auto dim = [](const uint32_t (&of)[3]) { return Dim{of[0], of[1], of[2]}; };
        launch.grid = dim(request->grid), launch.block = dim(request->block), launch.cluster = dim(request->cluster);
        launch.dynamic_shared = request->dynamic_shared;
        if (request->parameters != code.parameter_offsets.size())
            throw Fault(format("%s takes %zu parameters, got %u", request->kernel, code.parameter_offsets.size(),
                               request->parameters));
        launch.parameters.resize(code.parameter_bytes);
        for (size_t i = 0; i < code.parameter_offsets.size(); i++) {
            const Variable& one = code.kernel->parameters[i];
            memcpy(launch.parameters.data() + code.parameter_offsets[i], request->values[i],
                   bytes_of(one.type) * one.elements);
        }
        for (uint32_t i = 0; i < request->allocations; i++)
            launch.memory.allow({request->begins[i], request->ends[i], request->names[i], request->writable[i] != 0});
        launch.schedule.order = request->order, launch.schedule.async = request->async;
        launch.schedule.quantum = request->quantum, launch.schedule.seed = request->seed;
        launch.schedule.blocks_reversed = request->blocks_reversed;
        launch.checks = request->checks;
        if (request->max_steps) launch.max_steps = request->max_steps;
        launch.run();
        request->steps = launch.steps;
        return 0;
    } catch (const std::exception& problem) {
        return answer(problem.what(), error, room, 1);
    }
}

// cuTensorMapEncodeTiled, with the driver's numbers; 1: refused, with the reason in `error`.
PUBLIC int ptx_encode_tiled(uint8_t* map, uint32_t type, uint32_t rank, uint64_t address, const uint64_t* sizes,
                            const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                            uint32_t interleave, uint32_t swizzle, uint32_t, uint32_t fill, char* error, size_t room) {
    try {
        TensorMap made = encode_tiled({type, rank, address, sizes, strides, box, element_strides, interleave, swizzle,
                                       fill});
        memcpy(map, &made, sizeof made);
        return 0;
    } catch (const std::exception& problem) {
        return answer(problem.what(), error, room, 1);
    }
}
