// Latency of dependent loads: one thread follows pointers around a random cycle.

#include <cstdint>
#include <cuda_runtime.h>

namespace {

// Makes slot i hold the address of slot next[i].
__global__ void link_slots(char *slots, const int64_t *next, int64_t num_slots, int64_t stride_bytes) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < num_slots; i += step) {
        *reinterpret_cast<char **>(slots + i * stride_bytes) = slots + next[i] * stride_bytes;
    }
}

__global__ void chase(uint64_t *cursor, int64_t num_steps) {
    uint64_t address = *cursor;
#pragma unroll 16
    for (int64_t step = 0; step < num_steps; ++step) {
        // Assembly, because a compiler may neither reorder nor drop it; the load goes through every cache.
        asm volatile("ld.global.u64 %0, [%0];" : "+l"(address) : : "memory");
    }
    *cursor = address;
}

struct DeviceMemory {
    void *data = nullptr;
    cudaError_t allocate(size_t num_bytes) { return cudaMalloc(&data, num_bytes); }
    ~DeviceMemory() { cudaFree(data); }
};

struct Event {
    cudaEvent_t event = nullptr;
    ~Event() {
        if (event != nullptr) cudaEventDestroy(event);
    }
};

#define RETURN_ON_ERROR(call)                     \
    do {                                          \
        const cudaError_t error = (call);         \
        if (error != cudaSuccess) return error;   \
    } while (false)

cudaError_t walk(const int64_t *next, int64_t num_slots, int64_t stride_bytes, int64_t num_warm_up_steps,
                 int64_t num_steps, double *seconds, int64_t *last_slot) {
    DeviceMemory slots, links, cursor;
    Event start, stop;
    const size_t link_bytes = static_cast<size_t>(num_slots) * sizeof(int64_t);
    RETURN_ON_ERROR(slots.allocate(static_cast<size_t>(num_slots) * static_cast<size_t>(stride_bytes)));
    RETURN_ON_ERROR(links.allocate(link_bytes));
    RETURN_ON_ERROR(cursor.allocate(sizeof(uint64_t)));
    RETURN_ON_ERROR(cudaEventCreate(&start.event));
    RETURN_ON_ERROR(cudaEventCreate(&stop.event));
    RETURN_ON_ERROR(cudaMemcpy(links.data, next, link_bytes, cudaMemcpyHostToDevice));
    RETURN_ON_ERROR(cudaMemcpy(cursor.data, &slots.data, sizeof(uint64_t), cudaMemcpyHostToDevice));

    link_slots<<<256, 256>>>(static_cast<char *>(slots.data), static_cast<const int64_t *>(links.data),
                             num_slots, stride_bytes);
    RETURN_ON_ERROR(cudaGetLastError());
    chase<<<1, 1>>>(static_cast<uint64_t *>(cursor.data), num_warm_up_steps);
    RETURN_ON_ERROR(cudaEventRecord(start.event));
    chase<<<1, 1>>>(static_cast<uint64_t *>(cursor.data), num_steps);
    RETURN_ON_ERROR(cudaEventRecord(stop.event));
    RETURN_ON_ERROR(cudaGetLastError());
    RETURN_ON_ERROR(cudaEventSynchronize(stop.event));

    float milliseconds = 0.0f;
    uint64_t address = 0;
    RETURN_ON_ERROR(cudaEventElapsedTime(&milliseconds, start.event, stop.event));
    RETURN_ON_ERROR(cudaMemcpy(&address, cursor.data, sizeof(address), cudaMemcpyDeviceToHost));
    *seconds = milliseconds * 1e-3;
    *last_slot = static_cast<int64_t>(address - reinterpret_cast<uint64_t>(slots.data)) / stride_bytes;
    return cudaSuccess;
}

}  // namespace

// Walks from slot 0; writes the seconds of num_steps loads and the slot that the walk ends at. Returns a
// cudaError_t and leaves the calling thread's device as it was.
extern "C" int pointer_chase_walk(int device_index, const int64_t *next, int64_t num_slots,
                                  int64_t stride_bytes, int64_t num_warm_up_steps, int64_t num_steps,
                                  double *seconds, int64_t *last_slot) {
    int previous = 0;
    RETURN_ON_ERROR(cudaGetDevice(&previous));
    RETURN_ON_ERROR(cudaSetDevice(device_index));
    const cudaError_t error =
        walk(next, num_slots, stride_bytes, num_warm_up_steps, num_steps, seconds, last_slot);
    const cudaError_t restored = cudaSetDevice(previous);
    return error != cudaSuccess ? error : restored;
}

extern "C" const char *pointer_chase_error(int code) {
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}
