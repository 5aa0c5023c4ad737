// What copies that run on their own have in common. PTX ISA 9.7.9.25.
#pragma once
#include "launch.h"

namespace ptx {

// A bulk operation that its thread awaits by its group.
struct BulkOperation {
    bool read = false, done = false;
    bool known = false;              // its thread has waited for it, or for its reading
    Clock after_read, after;         // what who waits for it comes to know
    const Instruction* issued = nullptr;
};
using Bulk = std::shared_ptr<BulkOperation>;

// Adds one to the open group of a thread.
Bulk open_bulk(Warp& warp, const Instruction& i, unsigned lane);

// Tells an mbarrier, at a shared address, that bytes have come.
void complete(const Actor& actor, uint64_t mbarrier, unsigned bytes, Agent& agent);

// to = to op from, element by element.
enum class Reduce { None, Add, Min, Max, Inc, Dec, And, Or, Xor };
enum class Element { U8, U16, U32, S32, U64, S64, F16, F32, F64, BF16 };
using Combine = void (*)(uint8_t* to, const uint8_t* from, unsigned bytes);
Reduce reduction_named(const std::string& name);
Element element_named(const std::string& name);        // throws Fault
Combine combiner(Reduce reduce, Element element);      // nullptr: there is no such reduction

}  // namespace ptx
