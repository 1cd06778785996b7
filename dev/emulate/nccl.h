// nccl.h: what of NCCL llmc/dist.cuh uses, for ranks whose GPUs are emulated: MPI between host
// memories, which are all there is. A group's messages are one piece of a stream's work.
#ifndef EMULATE_NCCL_H
#define EMULATE_NCCL_H

#define OMPI_SKIP_MPICXX 1
#include <mpi.h>

#include <vector>

typedef int ncclResult_t;
typedef void *ncclComm_t;
typedef enum { ncclFloat = 4, ncclDouble = 8, ncclBfloat16 = 2 } ncclDataType_t;  // bytes
typedef struct {
    char bytes[128];
} ncclUniqueId;
enum { ncclSuccess };

inline const char *ncclGetErrorString(ncclResult_t) { return "an error of MPI"; }
inline ncclResult_t ncclGetUniqueId(ncclUniqueId *id) { return *id = {}, ncclSuccess; }
inline ncclResult_t ncclGetVersion(int *version) { return *version = 22800, ncclSuccess; }
inline ncclResult_t ncclCommInitRank(ncclComm_t *comm, int, ncclUniqueId, int) {
    return *comm = (void *)1, MPI_Init(NULL, NULL);
}
inline ncclResult_t ncclCommDestroy(ncclComm_t) { return MPI_Finalize(); }

inline cudaStream_t nccl_stream;  // of the group

struct NcclMessage {
    bool send;
    char *data;
    size_t bytes;
    int peer;
};
inline std::vector<NcclMessage> nccl_group;
inline bool nccl_in_group;

inline ncclResult_t ncclGroupStart(void) { return nccl_in_group = true, ncclSuccess; }

// All at once: the order in which ranks name their messages does not matter.
inline void nccl_exchange(const std::vector<NcclMessage> &messages) {
    std::vector<MPI_Request> requests;
    for (const NcclMessage &m : messages) {
        requests.emplace_back();
        if (m.send)
            MPI_Isend(m.data, (int)m.bytes, MPI_BYTE, m.peer, 1, MPI_COMM_WORLD, &requests.back());
        else
            MPI_Irecv(m.data, (int)m.bytes, MPI_BYTE, m.peer, 1, MPI_COMM_WORLD, &requests.back());
    }
    MPI_Waitall((int)requests.size(), requests.data(), MPI_STATUSES_IGNORE);
}

inline ncclResult_t nccl_add(NcclMessage message, cudaStream_t stream) {
    nccl_group.push_back(message);
    if (nccl_in_group) return ncclSuccess;
    emulate::enqueue(stream, [messages = nccl_group] { nccl_exchange(messages); });
    return nccl_group.clear(), ncclSuccess;
}

inline ncclResult_t ncclSend(const void *data, size_t count, ncclDataType_t type, int peer,
                             ncclComm_t, cudaStream_t stream) {
    nccl_stream = stream;
    return nccl_add({true, (char *)data, count * type, peer}, stream);
}
inline ncclResult_t ncclRecv(void *data, size_t count, ncclDataType_t type, int peer, ncclComm_t,
                             cudaStream_t stream) {
    nccl_stream = stream;
    return nccl_add({false, (char *)data, count * type, peer}, stream);
}
inline ncclResult_t ncclGroupEnd(void) {
    emulate::enqueue(nccl_stream, [messages = nccl_group] { nccl_exchange(messages); });
    return nccl_in_group = false, nccl_group.clear(), ncclSuccess;
}

#endif
