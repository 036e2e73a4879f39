// Drives an engine of NIXL's own through our declarations of its interface, and looks at it in place.
#include "nixl_abi.h"

#include <dlfcn.h>

#include <cstring>
#include <set>

static bool is_memory_and_files(const nixl_mem_list_t &kinds) {
    return std::set<nixl_mem_t>(kinds.begin(), kinds.end()) == std::set<nixl_mem_t>{DRAM_SEG, FILE_SEG};
}

// Makes the engine of the plugin at `path`, writes `length` bytes at `from` to the file at `offset` and reads them back
// to `to`. Returns an empty text, or what is not as declared.
extern "C" const char *nixl_abi_problem(const char *path, char *from, char *to, size_t length, int fd, size_t offset) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return dlerror();
    const auto init = reinterpret_cast<nixlBackendPlugin *(*)()>(dlsym(library, "nixl_plugin_init"));
    if (!init) return "no nixl_plugin_init";
    const nixlBackendPlugin *plugin = init();
    if (plugin->api_version != 1) return "another plugin API version";
    if (std::strcmp(plugin->get_plugin_name(), "POSIX") != 0) return "the plugin's name";
    if (!is_memory_and_files(plugin->get_backend_mems())) return "the plugin's kinds of memory";
    nixl_b_params_t options{{"use_uring", "true"}};
    const nixlBackendInitParams given{"an agent with a long name of its own", "POSIX", &options, false, 0,
                                      static_cast<nixl_thread_sync_t>(1), false};
    nixlBackendEngine *engine = plugin->create_engine(&given);
    if (!engine) return "no engine";
    if (engine->type != given.type) return "the engine's type";
    if (engine->custom_params != options) return "the engine's parameters";
    if (engine->local_agent != given.local_agent) return "the engine's agent";
    if (!engine->telemetry_events.empty() || engine->telemetry) return "the engine's telemetry";
    if (engine->init_error) return "the engine says it failed";
    if (!is_memory_and_files(engine->getSupportedMems())) return "the engine's kinds of memory";
    if (!engine->supportsLocal() || engine->supportsRemote() || engine->supportsNotif()) return "what the engine can";
    nixlBackendMD *memory = nullptr, *file = nullptr;
    const nixlBlobDesc file_blob{{0, 1 << 20, static_cast<uint64_t>(fd)}, ""};
    if (engine->registerMem(nixlBlobDesc{{reinterpret_cast<uintptr_t>(from), length, 0}, ""}, DRAM_SEG, memory) != 0)
        return "registering memory";
    if (engine->registerMem(file_blob, FILE_SEG, file) != 0) return "registering a file";
    for (const bool reads : {false, true}) {
        const nixl_xfer_op_t operation = reads ? NIXL_READ : NIXL_WRITE;
        nixlDescList<nixlMetaDesc> local(DRAM_SEG), remote(FILE_SEG);
        local.addDesc({{reinterpret_cast<uintptr_t>(reads ? to : from), length, 0}, memory});
        remote.addDesc({{offset, length, static_cast<uint64_t>(fd)}, file});
        nixlBackendReqH *request = nullptr;
        if (engine->prepXfer(operation, local, remote, given.local_agent, request, nullptr) != 0) return "preparing";
        nixl_status_t status = engine->postXfer(operation, local, remote, given.local_agent, request, nullptr);
        while (status == NIXL_IN_PROG) status = engine->checkXfer(request);
        if (status != NIXL_SUCCESS) return "moving";
        if (engine->releaseReqH(request) != 0) return "releasing";
    }
    engine->deregisterMem(file);
    engine->deregisterMem(memory);
    plugin->destroy_engine(engine);
    return "";
}
