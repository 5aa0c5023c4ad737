// The table of all instructions: those of every file, found by the longest name that fits.
#include <map>

#include "decoder.h"

namespace ptx {

const Table& all_entries() {
    static const Table all = [] {
        Table joined;
        for (auto part : {integer_instructions, carry_instructions, video_instructions, logic_instructions,
                          floating_instructions, approximation_instructions,
                          half_instructions, conversion_instructions, comparison_instructions, control_instructions,
                          call_instructions, move_instructions, memory_instructions, atomic_instructions,
                          warp_instructions, barrier_instructions, mbarrier_instructions, copy_instructions,
                          bulk_instructions, tensor_instructions, tensor_map_instructions, cluster_instructions,
                          mma_instructions, wgmma_instructions, matrix_move_instructions})
            for (auto& entry : part()) joined.push_back(entry);
        return joined;
    }();
    return all;
}

namespace {

bool fits(const Entry& entry, const std::vector<std::string>& name) {
    if (entry.types == Of::AnyType) return true;
    for (size_t i = name.size(); i-- > 0;) {
        if (!is_type(name[i])) continue;
        Type type = type_named(name[i]);
        bool half = type.is_half(), number = type.kind == Type::Float && !half;
        return entry.types == Of::Halves ? half : entry.types == Of::Floats ? number : !half && !number;
    }
    return entry.types == Of::Integers;
}

}  // namespace

const Entry* find_entry(const std::vector<std::string>& name, size_t& parts) {
    static const std::map<std::string, std::vector<const Entry*>> by_name = [] {
        std::map<std::string, std::vector<const Entry*>> made;
        for (auto& entry : all_entries()) made[entry.name].push_back(&entry);
        return made;
    }();
    const Entry* best = nullptr;
    std::string prefix;
    for (size_t i = 0; i < name.size(); i++) {
        prefix += (i ? "." : "") + name[i];
        auto found = by_name.find(prefix);
        if (found == by_name.end()) continue;
        for (const Entry* entry : found->second)
            if (fits(*entry, name)) best = entry, parts = i + 1;
    }
    return best;
}

}  // namespace ptx
