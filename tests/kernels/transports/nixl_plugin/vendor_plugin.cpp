// A storage plugin as a vendor would write one: a thread per transfer, pread and pwrite.
//
// How it behaves is in the name of its file, `libplugin_<NAME>.so`, so that one build serves all:
//   VENDOR     transfers end later, in another thread      ATONCE     they have ended when they are posted
//   LATE       they wait until the file `until` (an option) exists
//   FAILPOST   posting fails          FAILLATER  they fail after they were posted        THROWS  posting throws
//   SHORT      they move half of the bytes and report success: the interface has no count to tell the truth with
//   NEWABI     another plugin API version                  NULLINIT   no plugin          NOENGINE   no engine
//   INITERROR  an engine that says it failed               RAISES     an engine whose constructor throws
//   NOFILES    no files among what it moves
// Transfers are as they should be while there is a file `libplugin_<NAME>.so.well`.
#include "nixl_abi.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <stdexcept>
#include <thread>

namespace {

std::string own_path() {
    Dl_info found;
    return dladdr(reinterpret_cast<void *>(&own_path), &found) ? found.dli_fname : "";
}

std::string behaviour() {
    const std::string path = own_path(), prefix = "libplugin_";
    const size_t start = path.rfind(prefix) + prefix.size();
    return path.substr(start, path.rfind(".so") - start);
}

bool is_well() { return access((own_path() + ".well").c_str(), F_OK) == 0; }

nixl_mem_list_t memory_kinds() {
    if (behaviour() == "NOFILES") return {DRAM_SEG, OBJ_SEG};
    return {DRAM_SEG, FILE_SEG};
}

struct Piece {
    char *memory;
    size_t length;
    off_t offset;
    int fd;
};

bool move(const Piece &piece, bool reads) {
    for (size_t done = 0; done < piece.length;) {
        const ssize_t step = reads ? pread(piece.fd, piece.memory + done, piece.length - done, piece.offset + done)
                                   : pwrite(piece.fd, piece.memory + done, piece.length - done, piece.offset + done);
        if (step <= 0) return false;
        done += step;
    }
    return true;
}

using State = std::atomic<nixl_status_t>;

// A transfer outlives its handle: a vendor's device does not stop because someone stopped asking.
struct Transfer : nixlBackendReqH {
    std::vector<Piece> pieces;
    bool reads = false;
    std::shared_ptr<State> state = std::make_shared<State>(NIXL_IN_PROG);
};

struct Metadata : nixlBackendMD {};

}  // namespace

class VendorEngine final : public nixlBackendEngine {
  public:
    explicit VendorEngine(const nixlBackendInitParams *given) : nixlBackendEngine(given), name(behaviour()) {
        if (name == "RAISES") throw std::runtime_error("the vendor's device does not answer");
        init_error = name == "INITERROR";
        const auto until = custom_params.find("until");
        if (until != custom_params.end()) this->until = until->second;
    }

    bool supportsRemote() const override { return false; }
    bool supportsLocal() const override { return true; }
    bool supportsNotif() const override { return false; }
    nixl_mem_list_t getSupportedMems() const override { return memory_kinds(); }

    nixl_status_t registerMem(const nixlBlobDesc &, const nixl_mem_t &kind, nixlBackendMD *&made) override {
        if (kind != DRAM_SEG && kind != FILE_SEG) return NIXL_ERR_NOT_SUPPORTED;
        made = new Metadata;
        return NIXL_SUCCESS;
    }
    nixl_status_t deregisterMem(nixlBackendMD *metadata) override {
        delete metadata;
        return NIXL_SUCCESS;
    }
    nixl_status_t connect(const std::string &) override { return NIXL_SUCCESS; }
    nixl_status_t disconnect(const std::string &) override { return NIXL_SUCCESS; }
    nixl_status_t unloadMD(nixlBackendMD *) override { return NIXL_SUCCESS; }
    nixl_status_t loadLocalMD(nixlBackendMD *input, nixlBackendMD *&output) override {
        output = input;
        return NIXL_SUCCESS;
    }

    nixl_status_t prepXfer(const nixl_xfer_op_t &operation, const nixlDescList<nixlMetaDesc> &memory,
                           const nixlDescList<nixlMetaDesc> &file, const std::string &, nixlBackendReqH *&handle,
                           const nixlBackendOptionalArgs *) const override {
        if (file.type != FILE_SEG || memory.descriptors.size() != file.descriptors.size())
            return NIXL_ERR_INVALID_PARAM;
        auto transfer = std::make_unique<Transfer>();
        transfer->reads = operation == NIXL_READ;
        for (size_t i = 0; i < memory.descriptors.size(); ++i) {
            const nixlMetaDesc &from = memory.descriptors[i], &to = file.descriptors[i];
            const size_t length = does("SHORT") ? from.length / 1024 * 512 : from.length;
            transfer->pieces.push_back({reinterpret_cast<char *>(from.address), length, static_cast<off_t>(to.address),
                                       static_cast<int>(to.device)});
        }
        handle = transfer.release();
        return NIXL_SUCCESS;
    }

    nixl_status_t postXfer(const nixl_xfer_op_t &, const nixlDescList<nixlMetaDesc> &,
                           const nixlDescList<nixlMetaDesc> &, const std::string &, nixlBackendReqH *&handle,
                           const nixlBackendOptionalArgs *) const override {
        auto *transfer = static_cast<Transfer *>(handle);
        if (does("FAILPOST")) return NIXL_ERR_BACKEND;
        if (does("THROWS")) throw std::runtime_error("the vendor's device went away");
        const auto run = [pieces = transfer->pieces, reads = transfer->reads, state = transfer->state, until = until,
                          fails = does("FAILLATER")] {
            while (!until.empty() && access(until.c_str(), F_OK) != 0) usleep(1000);
            bool good = !fails;
            for (const Piece &piece : pieces) good = good && move(piece, reads);
            *state = good ? NIXL_SUCCESS : NIXL_ERR_BACKEND;
        };
        if (name == "ATONCE") {
            run();
            return *transfer->state;
        }
        std::thread(run).detach();
        return NIXL_IN_PROG;
    }

    nixl_status_t checkXfer(nixlBackendReqH *handle) const override { return *static_cast<Transfer *>(handle)->state; }

    nixl_status_t releaseReqH(nixlBackendReqH *handle) const override {
        delete handle;
        return NIXL_SUCCESS;
    }

  private:
    bool does(const char *what) const { return name == what && !is_well(); }

    const std::string name;
    std::string until;
};

extern "C" nixlBackendPlugin *nixl_plugin_init() {
    static nixlBackendPlugin plugin = {
        behaviour() == "NEWABI" ? 2 : 1,
        [](const nixlBackendInitParams *given) -> nixlBackendEngine * {
            return behaviour() == "NOENGINE" ? nullptr : new VendorEngine(given);
        },
        [](nixlBackendEngine *engine) { delete engine; },
        [] { return "VENDOR"; },
        [] { return "1.0"; },
        [] { return nixl_b_params_t{{"until", "path of a file"}}; },
        memory_kinds,
    };
    return behaviour() == "NULLINIT" ? nullptr : &plugin;
}

extern "C" void nixl_plugin_fini() {}
