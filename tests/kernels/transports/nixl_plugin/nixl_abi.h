// What a NIXL storage plugin shares with NIXL's core, as far as a plugin that moves memory to files needs it.
//
// The wheel has no headers. These are our own declarations of the same binary interface (plugin API version 1, NIXL
// 1.5.x): the order of virtual functions, the layout of what is passed, and nothing else. What only has to have a size
// is opaque. `test_nixl_abi.py` holds them against the wheel: its POSIX engine's table of virtual functions must have
// the same signatures in the same order, and that engine must work when it is driven through them.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

enum nixl_mem_t { DRAM_SEG, VRAM_SEG, BLK_SEG, OBJ_SEG, FILE_SEG };
enum nixl_xfer_op_t { NIXL_READ, NIXL_WRITE };
enum nixl_status_t {
    NIXL_IN_PROG = 1,
    NIXL_SUCCESS = 0,
    NIXL_ERR_INVALID_PARAM = -2,
    NIXL_ERR_BACKEND = -3,
    NIXL_ERR_NOT_SUPPORTED = -9,
};
enum class nixl_thread_sync_t : int;
enum class nixl_cost_t : int;
struct nixlAgentOptionalArgs;
struct nixlBackendOptionalArgs;

using nixl_b_params_t = std::unordered_map<std::string, std::string>;
using nixl_mem_list_t = std::vector<nixl_mem_t>;

struct nixlBackendInitParams {
    std::string local_agent;
    std::string type;
    nixl_b_params_t *custom_params;
    bool progress_thread;
    uint64_t progress_delay_us;
    nixl_thread_sync_t sync_mode;
    bool telemetry;
};

class nixlBackendReqH {
  public:
    virtual ~nixlBackendReqH() = default;
};

class nixlBackendMD {
  public:
    virtual ~nixlBackendMD() = default;

  protected:
    bool is_private = true;
};

struct nixlBasicDesc {
    uintptr_t address;  // In a file: the offset.
    size_t length;
    uint64_t device;  // Of a file: its descriptor.
};
struct nixlBlobDesc : nixlBasicDesc {
    std::string blob;
};
struct nixlMetaDesc : nixlBasicDesc {
    nixlBackendMD *metadata;
};
struct nixlRemoteMetaDesc;

template <class T> class nixlDescList {
  public:
    explicit nixlDescList(nixl_mem_t kind) : type(kind) {}
    virtual ~nixlDescList() = default;
    virtual void resize(const size_t &count) { descriptors.resize(count); }
    virtual void addDesc(const T &descriptor) { descriptors.push_back(descriptor); }
    virtual int getIndex(const nixlBasicDesc &) const { return -1; }

    nixl_mem_t type;
    std::vector<T> descriptors;
};

// The names are NIXL's, since names are a part of the signatures that are compared.
class nixlBackendEngine {
    using Blob = std::string;
    using Local = nixlDescList<nixlMetaDesc>;
    using Remote = nixlDescList<nixlRemoteMetaDesc>;
    using Registered = nixlDescList<nixlBlobDesc>;
    using Options = nixlBackendOptionalArgs;
    using Notifications = std::vector<std::pair<Blob, Blob>>;
    using Duration = std::chrono::microseconds;
    using Request = nixlBackendReqH;

  public:
    explicit nixlBackendEngine(const nixlBackendInitParams *given)
        : type(given->type), custom_params(*given->custom_params), local_agent(given->local_agent),
          telemetry(given->telemetry) {}

    virtual ~nixlBackendEngine() = default;
    virtual bool supportsRemote() const = 0;
    virtual bool supportsLocal() const = 0;
    virtual bool supportsNotif() const = 0;
    virtual nixl_mem_list_t getSupportedMems() const = 0;
    virtual nixl_status_t registerMem(const nixlBlobDesc &, const nixl_mem_t &, nixlBackendMD *&) = 0;
    virtual nixl_status_t deregisterMem(nixlBackendMD *) = 0;
    virtual nixl_status_t connect(const Blob &) = 0;
    virtual nixl_status_t disconnect(const Blob &) = 0;
    virtual nixl_status_t unloadMD(nixlBackendMD *) = 0;
    virtual nixl_status_t prepXfer(const nixl_xfer_op_t &, const Local &, const Local &, const Blob &, Request *&,
                                   const Options *) const = 0;
    virtual nixl_status_t postXfer(const nixl_xfer_op_t &, const Local &, const Local &, const Blob &, Request *&,
                                   const Options *) const = 0;
    virtual nixl_status_t checkXfer(Request *) const = 0;
    virtual nixl_status_t releaseReqH(Request *) const = 0;
    virtual nixl_status_t prepMemView(const Remote &, void *&, const Options *) const { return none; }
    virtual nixl_status_t prepMemView(const Local &, void *&, const Options *) const { return none; }
    virtual void releaseMemView(void *) const {}
    virtual nixl_status_t getPublicData(const nixlBackendMD *, Blob &) const { return none; }
    virtual nixl_status_t getConnInfo(Blob &) const { return none; }
    virtual nixl_status_t loadRemoteConnInfo(const Blob &, const Blob &) { return none; }
    virtual nixl_status_t loadRemoteMD(const nixlBlobDesc &, const nixl_mem_t &, const Blob &, nixlBackendMD *&) {
        return none;
    }
    virtual nixl_status_t loadLocalMD(nixlBackendMD *, nixlBackendMD *&) { return none; }
    virtual nixl_status_t getNotifs(Notifications &) { return none; }
    virtual nixl_status_t genNotif(const Blob &, const Blob &) const { return none; }
    virtual nixl_status_t queryMem(const Registered &, std::vector<std::optional<nixl_b_params_t>> &) const {
        return none;
    }
    virtual nixl_status_t estimateXferCost(const nixl_xfer_op_t &, const Local &, const Local &, const Blob &,
                                           Request *const &, Duration &, Duration &, nixl_cost_t &,
                                           const nixlAgentOptionalArgs *) const {
        return none;
    }

    // NIXL's core reads these in place.
    std::string type;
    nixl_b_params_t custom_params;
    std::vector<void *> telemetry_events;  // Of another type: empty here, as no event is ever added.
    std::mutex telemetry_lock;
    bool init_error = false;
    const std::string local_agent;
    const bool telemetry;

  private:
    static constexpr nixl_status_t none = NIXL_ERR_NOT_SUPPORTED;
};

struct nixlBackendPlugin {
    int api_version;
    nixlBackendEngine *(*create_engine)(const nixlBackendInitParams *);
    void (*destroy_engine)(nixlBackendEngine *);
    const char *(*get_plugin_name)();
    const char *(*get_plugin_version)();
    nixl_b_params_t (*get_backend_options)();
    nixl_mem_list_t (*get_backend_mems)();
};
