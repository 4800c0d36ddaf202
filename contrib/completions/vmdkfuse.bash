# Completion of vmdkfuse for bash. Generated from vmdkfuse.bash.in and the tables of the program by `make manual`.
# shellcheck shell=bash disable=SC2207 # the candidates are words

_vmdkfuse() {
    local keys='name= readonly= cache= cache-size= readahead= backend= cow= cache-dir= cache-dir-size= timeout= retry= limit= file= dir= format= allow-dir= extents= degraded= parent= member= force= lock= kernel-view= view-size= view-dir= server= user= password= cookie= thumbprint= datacenter= cainfo= insecure= cookie-script= cookie-script-renew= credentials= http-version= header= proxy= resolve= url= libdir= config= vm= snapshot= transports= nfchostport= single-link= unbuffered= compression= vimapiver= datastore= prepare-for-access= create= create-size= create-type= create-adapter-type= create-hwversion= port= uri= hostname= socket= socket-fd= vsock-cid= command= arg= export= dynamic-export= connections= shared= tls= tls-certificates= tls-verify= tls-username= tls-psk='
    local options='-r --read-only -f --foreground -o -P --pidfile --threads --config -v --verbose --log-file --log-format --list --info --map --check --prefetch --create --commit --unmount --fingerprint --dump --json --help -V --version'
    local mount_options='ro rw allow_other allow_root default_permissions auto_unmount nonempty uid= gid= umask= fsname=
        noexec nosuid nodev noatime'
    local line=${COMP_LINE:0:COMP_POINT} word words='' files='' value key prefix='' i action='' seen=0
    # bash splits words at `=` and `:`; the whole word is what follows the last blank.
    word=${line##*[[:space:]]}
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
        --unmount | --info | --map | --check | --list | --create | --commit | --fingerprint | --dump) action=${COMP_WORDS[i]} ;;
        -*) ;;
        *) seen=1 ;;
        esac
    done
    COMPREPLY=()
    case ${COMP_WORDS[COMP_CWORD - 1]} in
    --log-format) COMPREPLY=($(compgen -W 'text json' -- "$word")); return ;;
    --config | --log-file | --pidfile | -P) compopt -o filenames; COMPREPLY=($(compgen -f -- "$word")); return ;;
    -o)
        value=${word##*,}
        [[ $word == *,* ]] && prefix=${word%,*},
        COMPREPLY=($(compgen -P "$prefix" -W "$mount_options $keys" -- "$value"))
        [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
        return ;;
    esac
    case $word in
    -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
    *=*)
        key=${word%%=*} value=${word#*=}
        # What readline replaces is the part behind the `=`, unless the user has taken it out of COMP_WORDBREAKS.
        [[ $COMP_WORDBREAKS == *=* ]] || prefix=$key=
        case $key in
        readonly) words='true false' ;;
        cache) words='none writethrough writeback' ;;
        backend) words='native nbd https vddk' ;;
        cow) words='tmp' files=1 ;;
        cache-dir) words='' files=1 ;;
        file) words='' files=1 ;;
        dir) words='' files=1 ;;
        format) words='vmdk raw' ;;
        allow-dir) words='' files=1 ;;
        extents) words='any self' ;;
        degraded) words='cid orphan short' ;;
        parent) words='' files=1 ;;
        force) words='true false' ;;
        lock) words='on off' ;;
        kernel-view) words='auto off required' ;;
        view-dir) words='' files=1 ;;
        cainfo) words='' files=1 ;;
        insecure) words='true false' ;;
        credentials) words='' files=1 ;;
        http-version) words='1.1 2' ;;
        libdir) words='' files=1 ;;
        config) words='' files=1 ;;
        single-link) words='true false' ;;
        unbuffered) words='true false' ;;
        compression) words='none zlib fastlz skipz' ;;
        prepare-for-access) words='true false' ;;
        create) words='true false' ;;
        create-type) words='monolithic-sparse monolithic-flat split-sparse split-flat vmfs-flat vmfs-thin stream-optimized' ;;
        create-adapter-type) words='lsilogic buslogic ide legacyESX pvscsi' ;;
        socket) words='' files=1 ;;
        dynamic-export) words='true false' ;;
        shared) words='true false' ;;
        tls) words='off on require' ;;
        tls-certificates) words='' files=1 ;;
        tls-verify) words='true false' ;;
        tls-psk) words='' files=1 ;;
        esac
        COMPREPLY=($(compgen -P "$prefix" -W "$words" -- "$value"))
        if [[ $files ]]; then
            compopt -o filenames
            local found
            while IFS= read -r found; do COMPREPLY+=("$prefix$found"); done < <(compgen -f -- "$value")
        fi ;;
    *)
        if [[ $action == --unmount ]] || [[ ! $action && $seen == 0 ]]; then
            compopt -o filenames
            COMPREPLY=($(compgen -d -- "$word"))
        elif [[ $action != --dump ]]; then
            COMPREPLY=($(compgen -W "$keys" -- "$word"))
            if ((${#COMPREPLY[@]})); then
                compopt -o nospace
            else
                compopt -o filenames
                local found
                while IFS= read -r found; do COMPREPLY+=("$found"); done < <(compgen -f -- "$word")
            fi
        fi ;;
    esac
}

complete -F _vmdkfuse vmdkfuse
