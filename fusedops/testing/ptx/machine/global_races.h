// Global memory that clusters of one launch share with nothing to order them: one reads what another has written, or
// two write different values to one byte. A cluster that looked at global memory with an atomic or a strong load may
// have been told, so what it does after that is not judged.
#pragma once
#include <unordered_map>

#include "memory.h"

namespace ptx {

class GlobalRaces {
  public:
    // Of one access, before it takes place; throws Fault.
    void touch(const Actor& actor, uint64_t begin, uint64_t end, Access access);
    // When the cluster has ended: which of its writes left another value than the other cluster's.
    void finish(const Cluster& cluster);

  private:
    static constexpr unsigned PAGE_LOG2 = 10;
    struct Page {
        uint32_t writer[1 << PAGE_LOG2] = {};         // of each byte: number of the cluster + 1
    };
    struct Conflict {                                 // a write over another cluster's
        uint64_t address;
        uint8_t before;
        uint32_t writer;
        const Warp* warp;
        const Instruction* instruction;
    };
    std::unordered_map<uint64_t, std::unique_ptr<Page>> pages_;
    std::vector<Conflict> conflicts_;
    const Cluster* synchronised_ = nullptr;

    void write(const Actor& actor, Page& page, uint64_t begin, uint64_t end, uint32_t me, bool judged);
    void read(const Actor& actor, const Page& page, uint64_t begin, uint64_t end, uint32_t me);
};

}  // namespace ptx
