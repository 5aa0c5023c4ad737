// One launch: blocks run cluster by cluster, the warps of a cluster in turns that a schedule decides.
#pragma once
#include <deque>
#include <functional>

#include "memory.h"
#include "warp.h"

namespace ptx {

struct Dim {
    unsigned x = 1, y = 1, z = 1;
    unsigned volume() const { return x * y * z; }
};

// In which order things happen that the hardware leaves open.
struct Schedule {
    enum Order { RoundRobin, Ascending, Descending, Random };   // Ascending: the first warp that can run runs on
    enum Async { Early, Late, Shuffled };                       // when asynchronous operations take place
    int order = RoundRobin;
    unsigned quantum = 1;            // instructions of a warp's turn
    int async = Late;
    uint64_t seed = 0;
    int blocks_reversed = 0;         // the last block runs first
};

struct Checks {                      // each can be switched off
    enum : uint32_t { Bounds = 1, Uninitialised = 2, Races = 4, ReadOnly = 8, Leftovers = 16, Proxies = 32, All = 63 };
};

struct Block {
    Cluster& cluster;
    const Dim index;                 // in the grid
    const unsigned rank;             // in the cluster
    std::vector<std::unique_ptr<Warp>> warps;
    SharedMemory shared;
    States states;

    Block(Cluster& cluster, Dim index, unsigned rank);
    unsigned threads() const;
    bool done() const;
};

// An asynchronous operation that has been issued and not yet done.
struct Pending {
    std::function<void()> run;
    Warp* issuer;
    const Instruction* instruction;
};

struct Cluster {
    Launch& launch;
    const Dim first;                 // index in the grid of its block of rank 0
    std::vector<std::unique_ptr<Block>> blocks;
    std::deque<Pending> pending;
    bool explaining = false;         // waiting handlers say why
    uint64_t random;
    States states;

    Cluster(Launch& launch, Dim first);
    void run();                      // until every thread has exited; throws Fault
    // Does something that an instruction asked for: now, later or at random, as the schedule says.
    void defer(Warp& issuer, const Instruction& instruction, std::function<void()> operation);
    bool run_pending();              // one of them; false: there is none
    uint64_t draw();                 // pseudo-random
    // An agent for an asynchronous operation: it knows what `issuer` did so far, and nothing that comes later.
    // Where the operation is done, release it into the Clock that waiting threads acquire.
    std::shared_ptr<Agent> fork(Warp& issuer);
    std::string describe_agent(unsigned id) const;

  private:
    struct Ended {                   // an operation's agent: its number may be given again to who knows of its end
        unsigned id;
        uint32_t tick;
    };
    std::vector<Warp*> agents_;      // by number: the warp, or who issued the operation
    unsigned warps_ = 0;             // the first agents are warps
    std::shared_ptr<std::vector<Ended>> ended_ = std::make_shared<std::vector<Ended>>();
    bool turn();                     // every warp once; returns whether anything was done
    [[noreturn]] void deadlock();
    void finish();                   // checks that hold at the end of a cluster
};

struct Launch {
    const Program& program;
    const Code& code;
    Dim grid, block, cluster;
    unsigned dynamic_shared = 0;
    std::vector<uint8_t> parameters; // the parameter bank
    Memory memory;
    Schedule schedule;
    uint32_t checks = Checks::All;
    uint64_t max_steps = 1ull << 34; // instructions of a warp; more is a loop without end
    uint64_t steps = 0;
    States states;

    Launch(const Program& program, const Code& code) : program(program), code(code), memory(program) {}
    bool checking(uint32_t check) const { return checks & check; }
    void run();
};

template <class Explain> Step Warp::wait(Explain explain) {
    if (cluster().explaining) group->waiting = explain();
    return Step::Wait;
}

// A file that has something to look at when the threads of a cluster have exited (copies that nobody waited for, ...)
// has one static object of this kind; `check` throws Fault.
struct LeftoverCheck {
    explicit LeftoverCheck(void (*check)(Cluster&));
};
void check_leftovers(Cluster& cluster);

}  // namespace ptx
