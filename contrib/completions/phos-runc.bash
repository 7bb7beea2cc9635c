# bash completion for phos-runc: /usr/share/bash-completion/completions/phos-runc

_phos_runc_ids() {
    local root=/run/runc i
    for ((i = 1; i < COMP_CWORD; i++)); do
        [[ ${COMP_WORDS[i]} == --root ]] && root=${COMP_WORDS[i + 1]}
    done
    local dir
    for dir in "$root"/*/; do
        [[ -e $dir/state.json ]] && basename "$dir"
    done
}

_phos_runc() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
    local verbs="checkpoint create delete doctor events exec features gpu inspect kill list pause ps restore resume run spec start state update"
    local verb="" i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            --root | --log | --log-format | --criu | --rootless) ((i++)) ;;
            -*) ;;
            *)
                verb=${COMP_WORDS[i]}
                break
                ;;
        esac
    done
    case $prev in
        --root | --bundle | -b | --image-path | --work-path | --parent-path)
            mapfile -t COMPREPLY < <(compgen -d -- "$cur")
            return
            ;;
        --log | --trace | --pid-file | --console-socket | --process | -p)
            mapfile -t COMPREPLY < <(compgen -f -- "$cur")
            return
            ;;
        --log-format)
            mapfile -t COMPREPLY < <(compgen -W "text json" -- "$cur")
            return
            ;;
    esac
    local words
    case $verb in
        "") words="--debug --log --log-format --root --systemd-cgroup --rootless --help --version $verbs" ;;
        inspect)
            words="--json --verify"
            if [[ $cur != -* ]]; then
                mapfile -t COMPREPLY < <(compgen -d -- "$cur")
                return
            fi
            ;;
        checkpoint) words="--image-path --work-path --leave-running --pre-dump --parent-path --trace --tcp-established --ext-unix-sk --shell-job --file-locks --manage-cgroups-mode" ;;
        restore) words="--image-path --work-path --trace --bundle --detach --pid-file --console-socket --no-subreaper --no-pivot --tcp-established --ext-unix-sk --shell-job --file-locks --manage-cgroups-mode" ;;
        create | run) words="--bundle --console-socket --pid-file --no-pivot --no-new-keyring --preserve-fds" ;;
        delete) words="--force" ;;
        doctor | gpu) words="--json" ;;
        *) words="" ;;
    esac
    [[ -n $verb && $cur != -* && $verb != create && $verb != doctor && $verb != run && $verb != restore ]] && words=$(_phos_runc_ids)
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}

complete -F _phos_runc phos-runc
