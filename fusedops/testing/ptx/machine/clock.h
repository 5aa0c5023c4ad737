// Happens-before, as vector clocks. An agent is whoever touches memory in its own order: a warp, or an asynchronous
// operation. What one agent did is known to another once a chain of release and acquire leads there.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace ptx {

struct Clock {
    std::vector<uint32_t> ticks;     // by agent; missing ones are 0
    std::vector<uint32_t> proxied;   // generic writes up to these ticks are before a fence.proxy.async

    uint32_t of(unsigned agent) const { return agent < ticks.size() ? ticks[agent] : 0; }
    uint32_t proxied_of(unsigned agent) const { return agent < proxied.size() ? proxied[agent] : 0; }
    void join(const Clock& other) {
        join(ticks, other.ticks);
        join(proxied, other.proxied);
    }
    bool empty() const { return ticks.empty(); }
    void know(unsigned agent, uint32_t tick) {       // what it did up to there
        if (ticks.size() <= agent) ticks.resize(agent + 1);
        ticks[agent] = std::max(ticks[agent], tick);
    }

  private:
    static void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
        if (into.size() < from.size()) into.resize(from.size());
        for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
    }
};

struct Agent {
    unsigned id = 0;
    Clock clock;
    Clock seen;                      // through relaxed loads and atomics: known after the next fence or barrier
    Clock fenced;                    // what the last fence came after: relaxed stores and atomics publish it
    uint32_t published = 0;          // the last tick that others may know

    uint32_t now() const { return clock.of(id); }
    void tick() {
        if (clock.ticks.size() <= id) clock.ticks.resize(id + 1);
        clock.ticks[id]++;
    }
    void release(Clock& into) {      // what was done so far becomes known to whoever acquires `into`
        into.join(clock);
        if (!seen.empty()) into.join(seen);
        published = now();
        tick();
    }
    void acquire(const Clock& from) { clock.join(from); }
};

}  // namespace ptx
