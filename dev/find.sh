#!/bin/sh
# Finds a library of NVIDIA's by its header and its shared object, in the first place that has both:
#
#     dev/find.sh cudnn|nccl|cudnn-frontend    prints "include-folder shared-object version", or nothing
#
# Places: CUDNN_HOME, NCCL_HOME or CUDNN_FRONTEND_PATH, and where that is set no other; CUDA_HOME; the
# Python wheels nvidia-cudnn-cu*, nvidia-nccl-cu*, nvidia-cudnn-frontend of the python3 on the PATH;
# the system. cudnn-frontend is headers alone; its shared object is "-".
case $1 in
cudnn) home=$CUDNN_HOME header=cudnn_version.h object=libcudnn.so ;;
nccl) home=$NCCL_HOME header=nccl.h object=libnccl.so ;;
cudnn-frontend) home=$CUDNN_FRONTEND_PATH header=cudnn_frontend_version.h object= ;;
*) echo "dev/find.sh: found '$1', expected cudnn, nccl or cudnn-frontend" >&2; exit 2 ;;
esac

# The version in a header: "#define CUDNN_MAJOR 9" and its two neighbours make 9.19.0.
version() {
    awk '/^#define +[A-Z_]*(MAJOR|MINOR|PATCH)[A-Z_]* +[0-9]+/ && n < 3 { v = v (n++ ? "." : "") $3 } END { print v }' "$1"
}

# Prints what is found below folder $1; fails where header or object is missing.
look() {
    for include in "$1/include" "$1/include/$(uname -m)-linux-gnu" "$1"; do
        [ -f "$include/$header" ] || continue
        for lib in "$1/lib64" "$1/lib" "$1/lib/$(uname -m)-linux-gnu"; do
            for so in ${object:+"$lib/$object" "$lib/$object".[0-9]*}; do
                [ -f "$so" ] && echo "$include $so $(version "$include/$header")" && return 0
            done
        done
        [ -z "$object" ] && echo "$include - $(version "$include/$header")" && return 0
    done
    return 1
}

python_packages() {
    python3 -c 'import site; print(*site.getsitepackages(), site.getusersitepackages(), sep="\n")' 2>/dev/null
}

if [ "$home" ]; then
    look "$home"
    exit
fi
for place in ${CUDA_HOME:+"$CUDA_HOME"} $(python_packages | sed 's|$|/nvidia/'"$1"'|; p; s|/nvidia/.*||') \
    /usr/local/cuda /usr/local /usr; do
    look "$place" && exit
done
exit 1
