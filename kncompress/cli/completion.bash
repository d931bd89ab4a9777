# bash completion of kncompress (bash 4 or newer). For this shell: source <(kncompress completion bash)
# Candidates come from the program itself, so they are those of the version that the line would start.

_kncompress() {
    local line=${COMP_LINE:0:COMP_POINT} found prefix
    local -a words call answer
    read -r -a words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    words[0]=${words[0]/#\~/$HOME}
    if [[ ${words[0]##*/} == python* ]]; then
        [[ ${words[1]} == -m && ${words[2]} == kncompress && ${#words[@]} -gt 3 ]] || return
        call=("${words[@]:0:3}")
    else
        call=("${words[0]}")
    fi
    mapfile -t answer < <("${call[@]}" completion query "${words[@]:${#call[@]}}" 2> /dev/null)
    # The first line says whether names of files complete the word too, and whether a space follows a candidate.
    [[ ${answer[0]} == *files* ]] && compopt -o default 2> /dev/null
    [[ ${answer[0]} == *open* ]] && compopt -o nospace 2> /dev/null
    # bash replaces the word after the last break; = and : are breaks unless the user has changed that.
    found=${words[-1]}
    prefix=
    [[ $COMP_WORDBREAKS == *=* && $found == *=* ]] && prefix=${found%"${found##*=}"}
    [[ $COMP_WORDBREAKS == *:* && $found == *:* ]] && prefix=${found%"${found##*[=:]}"}
    COMPREPLY=("${answer[@]:1}")
    COMPREPLY=("${COMPREPLY[@]#"$prefix"}")
}

complete -F _kncompress kncompress
# python -m kncompress, where nothing else completes python.
for _kncompress_python in python python3; do
    complete -p "$_kncompress_python" &> /dev/null || complete -o default -F _kncompress "$_kncompress_python"
done
unset _kncompress_python
