// The sample program's kernels. Integer arithmetic that wraps, so that every GPU and the host agree to the last bit.
// sample.ptx beside this file is compiled from it (build.sh); the program carries that.

extern "C" {

// The program also finds and checks this variable of the module: the driver saves it, not libphos.so.
__device__ unsigned int generation;

// One step of a linear congruential generator in every word, mixed with the step and the word's place.
__global__ void advance(unsigned int *data, unsigned long long count, unsigned int step) {
    unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride)
        data[i] = data[i] * 1664525u + 1013904223u + step * 2654435761u + (unsigned int)i;
}

// Adds the words of `from` to those of `to`.
__global__ void combine(unsigned int *to, const unsigned int *from, unsigned long long count) {
    unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride)
        to[i] += from[i];
}

// Counts steps in the module's variable.
__global__ void count_generation() { generation += 1; }

// Runs until the host writes something other than zero to `flag`.
__global__ void spin(volatile unsigned int *flag) {
    while (*flag == 0) {}
}
}
