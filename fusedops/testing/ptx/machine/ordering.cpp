#include "ordering.h"

#include <unordered_map>

#include "launch.h"

namespace ptx {

namespace {

// Clocks by place. Blocks of other clusters have run before or will run after, so theirs are never needed.
struct Released {
    std::unordered_map<const uint8_t*, Clock> at;
};

template <class F> void each_place(Mask active, uint8_t* const* places, F f) {
    const uint8_t* last = nullptr;
    for (; active; active &= active - 1) {
        const uint8_t* place = places[__builtin_ctz(active)];
        if (place != last) f(place);
        last = place;
    }
}

}  // namespace

void acquire(Warp& warp, Mask active, uint8_t* const* places, Sync sync) {
    auto& released = warp.cluster().states.get<Released>().at;
    if (released.empty()) return;
    each_place(active, places, [&](const uint8_t* place) {
        auto found = released.find(place);
        if (found == released.end()) return;
        if (sync == Sync::Ordered) warp.agent.acquire(found->second);
        else warp.agent.seen.join(found->second);
    });
}

void release(Warp& warp, Mask active, uint8_t* const* places, Sync sync) {
    if (sync == Sync::Relaxed && warp.agent.fenced.empty()) return;
    auto& released = warp.cluster().states.get<Released>().at;
    Clock what = warp.agent.fenced;
    if (sync == Sync::Ordered) warp.agent.release(what);
    each_place(active, places, [&](const uint8_t* place) { released[place].join(what); });
}

void memory_fence(Warp& warp) {
    warp.agent.acquire(warp.agent.seen);
    warp.agent.seen = Clock();
    warp.agent.release(warp.agent.fenced);
}

void proxy_fence(Warp& warp) {
    Clock& clock = warp.agent.clock;
    clock.proxied = clock.ticks;
    warp.agent.tick();                                // what the warp writes from now on comes after the fence
}

}  // namespace ptx
