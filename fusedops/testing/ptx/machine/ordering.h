// Acquire and release through memory: ld.acquire, st.release, atomics with .acquire, .release or .acq_rel, and relaxed
// ones beside fences.
#pragma once
#include "warp.h"

namespace ptx {

enum class Sync { None, Relaxed, Ordered };           // Ordered: .acquire on a read, .release on a write

// What was released at these places is now known to the warp: at once, or for Relaxed after its next fence or barrier.
void acquire(Warp& warp, Mask active, uint8_t* const* places, Sync sync);
// What the warp knows is given to who acquires at these places: all of it, or for Relaxed up to its last fence.
void release(Warp& warp, Mask active, uint8_t* const* places, Sync sync);

}  // namespace ptx
