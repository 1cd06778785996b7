# translate.sed: CUDA C++ -> C++, for sed -E -z: launches, and a block's dynamic shared memory.
s/([A-Za-z_][A-Za-z0-9_]*(<[^<>;(){}]*>)?)[ \n]*<<<(([^>]|>[^>]|>>[^>])*)>>>\(/emulate::launch("\1", \1, \3)(/g
s/extern __shared__ (__align__\([0-9]+\) )?([a-z0-9_ ]+) ([a-z_]+)\[\];/auto *\3 = (\2 *)emulate::shared;/g
s/__shared__ (alignas\([0-9]+\)) /\1 __shared__ /g
